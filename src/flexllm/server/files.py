"""`/v1/files`: training data in, results out."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from starlette.responses import FileResponse

from flexllm.server.context import Context, get_context
from flexllm.server.errors import ApiError, bad_request, not_found
from flexllm.server.shelf import PURPOSE
from flexllm.server.store import FileRecord, Page, Record, Store

router = APIRouter()
ContextParam = Annotated[Context, Depends(get_context)]


def show_file(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": None,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": record.status_details,
    }


def show_page(page: Page[Record], show: Any) -> dict[str, Any]:
    ids = [record.id for record in page.data]
    return {
        "object": "list",
        "data": [show(record) for record in page.data],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": page.has_more,
    }


@router.post("/v1/files")
async def upload_file(
    request: Request, context: ContextParam, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]
) -> dict[str, Any]:
    if unknown := sorted(set(await request.form()) - {"file", "purpose"}):
        raise bad_request(f"{unknown[0]} is not supported", unknown[0])
    if purpose != PURPOSE:
        raise bad_request(f"purpose must be {PURPOSE!r}, got {purpose!r}", "purpose")
    return show_file(await asyncio.to_thread(context.shelf.receive, file))


@router.get("/v1/files")
async def list_files(
    context: ContextParam,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    page = context.store.files.page(after=after, limit=limit, descending=order == "desc", owner=purpose)
    return show_page(page, show_file)


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, context: ContextParam) -> dict[str, Any]:
    return show_file(find_file(context.store, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def file_content(file_id: str, context: ContextParam) -> FileResponse:
    record = find_file(context.store, file_id)
    return FileResponse(context.shelf.path(file_id), media_type="application/octet-stream", filename=record.filename)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, context: ContextParam) -> dict[str, Any]:
    find_file(context.store, file_id)
    if users := [job.id for job in context.finetuning.active_jobs() if file_id in (job.training_file, job.validation_file)]:
        raise ApiError(409, f"file {file_id!r} is in use by {users[0]}", code="file_in_use")
    context.shelf.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def find_file(store: Store, file_id: str, param: str | None = None) -> FileRecord:
    record = store.files.get(file_id)
    if record is None:
        raise not_found("file", file_id, param)
    return record
