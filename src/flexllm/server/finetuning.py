"""`/v1/fine_tuning/jobs`."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request

from flexllm.peft.config import PeftConfig
from flexllm.server.context import Context, get_context
from flexllm.server.errors import bad_request, not_found
from flexllm.server.files import find_file, show_page
from flexllm.server.job_options import JobOptions, resolve_options, show_hyperparameters, show_method
from flexllm.server.shelf import PURPOSE
from flexllm.server.store import AdapterRecord, CheckpointRecord, EventRecord, FileRecord, JobRecord
from flexllm.server.wire import JobRequest

router = APIRouter(prefix="/v1/fine_tuning/jobs")
ContextParam = Annotated[Context, Depends(get_context)]
Limit = Annotated[int, Query(ge=1, le=1000)]
ORGANIZATION_ID = "org-local"


@router.post("")
async def create_job(
    body: JobRequest, context: ContextParam, project: Annotated[str, Header(alias="OpenAI-Project", max_length=256)] = ""
) -> dict[str, Any]:
    base = context.find_model(body.model)
    training = _usable_file(context, body.training_file, "training_file")
    if body.validation_file is not None:
        _usable_file(context, body.validation_file, "validation_file")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    options = resolve_options(
        body,
        examples=training.examples,
        seed=seed,
        max_model_len=context.model.max_model_len if context.model else None,
        continued=None if base is None else await asyncio.to_thread(_adapter_shape, base),
    )
    job = JobRecord(
        id=context.store.new_id("ftjob"),
        created_at=int(time.time()),
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        status="validating_files",
        seed=seed,
        finetune=options.finetune,
        peft=options.peft,
        learning_rate_multiplier=options.learning_rate_multiplier,
        suffix=body.suffix,
        metadata=body.metadata,
        init_adapter=None if base is None else base.path,
        tenant=project,
    )
    context.finetuning.create(job)
    return show_job(context, job)


@router.get("")
async def list_jobs(request: Request, context: ContextParam, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first. `metadata[key]=value` keeps the jobs that carry it."""
    metadata = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            metadata[name[len("metadata[") : -1]] = value
        elif name not in ("after", "limit"):
            raise bad_request(f"{name} is not supported", name)
    page = context.store.jobs.page(after=after, limit=limit, metadata=metadata)
    return show_page(page, lambda job: show_job(context, job))


@router.get("/{job_id}")
async def retrieve_job(job_id: str, context: ContextParam) -> dict[str, Any]:
    return show_job(context, _find(context, job_id))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, context: ContextParam) -> dict[str, Any]:
    return show_job(context, await context.finetuning.cancel(_find(context, job_id)))


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, context: ContextParam) -> dict[str, Any]:
    return show_job(context, await context.finetuning.pause(_find(context, job_id)))


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, context: ContextParam) -> dict[str, Any]:
    return show_job(context, await context.finetuning.resume(_find(context, job_id)))


@router.get("/{job_id}/events")
async def list_events(job_id: str, context: ContextParam, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    _find(context, job_id)
    return show_page(context.store.events.page(after=after, limit=limit, owner=job_id), show_event)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(job_id: str, context: ContextParam, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
    """Newest first."""
    _find(context, job_id)
    return show_page(context.store.checkpoints.page(after=after, limit=limit, owner=job_id), show_checkpoint)


# -------------------------------------------------------------------------------------------------------------- shapes
def show_job(context: Context, job: JobRecord) -> dict[str, Any]:
    options = JobOptions(job.finetune, job.peft, job.learning_rate_multiplier)
    running = job.status == "running"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANIZATION_ID,
        "status": job.status,
        "hyperparameters": show_hyperparameters(options),
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "seed": job.seed,
        "trained_tokens": job.trained_tokens if job.status == "succeeded" else None,
        "error": job.error,
        "estimated_finish": context.metrics.estimated_finish(job.id) if running else None,
        "integrations": None,
        "metadata": job.metadata,
        "method": show_method(options),
    }


def show_event(record: EventRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "fine_tuning.job.event",
        "created_at": record.created_at,
        "level": record.level,
        "message": record.message,
        "type": record.type,
        "data": record.data,
    }


def show_checkpoint(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": record.created_at,
        "fine_tuned_model_checkpoint": record.model,
        "fine_tuning_job_id": record.job_id,
        "step_number": record.step_number,
        "metrics": record.metrics,
    }


def _find(context: Context, job_id: str) -> JobRecord:
    job = context.store.jobs.get(job_id)
    if job is None:
        raise not_found("fine-tuning job", job_id)
    return job


def _usable_file(context: Context, file_id: str, param: str) -> FileRecord:
    record = find_file(context.store, file_id, param)
    if record.purpose != PURPOSE:
        raise bad_request(f"{param} {file_id!r} has purpose {record.purpose!r}, not {PURPOSE!r}", param)
    if record.status != "processed":
        raise bad_request(f"{param} {file_id!r} is not usable: {record.status_details or record.status}", param, code="invalid_file")
    return record


def _adapter_shape(adapter: AdapterRecord) -> PeftConfig:
    from flexllm.peft.io import load_adapter  # loads torch

    try:
        return load_adapter(adapter.path).config
    except ValueError as error:
        raise bad_request(f"cannot continue {adapter.id!r}: {error}", "model") from None
