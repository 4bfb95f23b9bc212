"""`/v1/models`, and vLLM's endpoints that load and unload adapters."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import PlainTextResponse

from flexllm.server import protocol
from flexllm.server.context import Context, get_context
from flexllm.server.engine_client import EngineUnavailable
from flexllm.server.errors import ApiError, bad_request, not_found
from flexllm.server.store import AdapterRecord
from flexllm.server.wire import LoadAdapterRequest, UnloadAdapterRequest

router = APIRouter()
ContextParam = Annotated[Context, Depends(get_context)]


@router.get("/v1/models")
async def list_models(context: ContextParam) -> dict[str, Any]:
    cards = [show_base(context), *(show_adapter(context, record) for record in context.store.adapters.all())]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, context: ContextParam) -> dict[str, Any]:
    adapter = context.find_model(model)
    return show_base(context) if adapter is None else show_adapter(context, adapter)


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, context: ContextParam) -> dict[str, Any]:
    adapter = context.find_model(model)
    if adapter is None:
        raise bad_request(f"{model!r} is the base model; only adapters can be deleted", "model")
    await remove_adapter(context, adapter)
    return {"id": model, "object": "model", "deleted": True}


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_adapter(body: LoadAdapterRequest, context: ContextParam) -> str:
    path = _confined(context, body.lora_path)
    existing = context.store.adapters.get(body.lora_name)
    if body.lora_name == context.model_name or (existing is not None and not body.load_inplace):
        raise bad_request(f"a model named {body.lora_name!r} is served already", "lora_name", code="model_exists")
    if existing is not None and existing.job_id is not None:
        raise bad_request(f"{body.lora_name!r} belongs to {existing.job_id}", "lora_name", code="model_exists")
    if not path.is_dir():
        raise not_found("adapter folder", body.lora_path, param="lora_path")
    _, engine = context.ready()
    try:
        await engine.call(protocol.RegisterAdapter, name=body.lora_name, path=str(path))
    except ValueError as error:
        raise bad_request(str(error), "lora_path", code="invalid_adapter") from None
    if existing is not None:
        context.store.adapters.delete(existing.id)
    context.store.adapters.insert(AdapterRecord(id=body.lora_name, created_at=int(time.time()), path=str(path)))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_adapter(body: UnloadAdapterRequest, context: ContextParam) -> str:
    _require_loading(context)
    adapter = context.store.adapters.get(body.lora_name)
    if adapter is None:
        raise not_found("model", body.lora_name, param="lora_name", code="model_not_found")
    await remove_adapter(context, adapter)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def remove_adapter(context: Context, adapter: AdapterRecord) -> None:
    """Requests in flight finish with it. The files go if a job of this server made them."""
    if users := [job.id for job in context.finetuning.active_jobs() if job.init_adapter == adapter.path]:
        raise ApiError(409, f"{adapter.id!r} is in use by {users[0]}", code="model_in_use")
    context.store.adapters.delete(adapter.id)
    if context.engine is not None:
        with contextlib.suppress(EngineUnavailable):  # then it will not be registered when the engine is back
            await context.engine.call(protocol.UnregisterAdapter, name=adapter.id)
    if adapter.job_id is not None:
        await asyncio.to_thread(shutil.rmtree, adapter.path, ignore_errors=True)


def show_base(context: Context) -> dict[str, Any]:
    model = context.model
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "flexllm",
        "root": str(model.folder) if model else context.model_name,
        "parent": None,
        "max_model_len": model.max_model_len if model else None,
    }


def show_adapter(context: Context, record: AdapterRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "model",
        "created": record.created_at,
        "owned_by": "flexllm",
        "root": record.path,
        "parent": context.model_name,
        "max_model_len": None,
    }


def _require_loading(context: Context) -> None:
    if not context.settings.enable_adapter_loading or context.settings.adapter_dir is None:
        raise ApiError(403, "loading adapters is off; start the server with --enable-adapter-loading", code="adapter_loading_disabled")


def _confined(context: Context, given: str) -> Path:
    """`given`, absolute or relative to the adapter folder, and within it."""
    _require_loading(context)
    assert context.settings.adapter_dir is not None
    if "\0" in given:
        raise bad_request("lora_path must not contain a null character", "lora_path")
    folder = context.settings.adapter_dir.resolve()
    path = (folder / given).resolve()
    if path == folder or not path.is_relative_to(folder):
        raise ApiError(403, "lora_path must be inside the server's adapter folder", param="lora_path", code="path_not_allowed")
    return path
