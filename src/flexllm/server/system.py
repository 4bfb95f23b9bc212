"""Health, version, metrics, the scheduler's settings, live figures and the page that draws them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import FileResponse, JSONResponse, Response

from flexllm import __version__
from flexllm.server.context import LOADING_RETRY_SECONDS, Context, get_context
from flexllm.server.engine_client import EngineUnavailable
from flexllm.server.errors import ApiError
from flexllm.server.wire import SchedulerPatch

router = APIRouter()
ContextParam = Annotated[Context, Depends(get_context)]


@router.get("/health", responses={503: {"description": "Loading, draining or dead"}})
async def health(context: ContextParam) -> Response:
    body: dict[str, Any] = {"status": context.status}
    if context.status == "ready":
        return JSONResponse(body)
    if context.status == "loading" and context.engine is not None:
        body |= {"stage": context.engine.progress.stage, "progress": context.engine.progress.fraction}
    if context.failure is not None:
        body["message"] = context.failure
    return JSONResponse(body, status_code=503, headers={"retry-after": str(LOADING_RETRY_SECONDS)})


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextParam) -> Response:
    return Response(generate_latest(context.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/flexllm/stats")
async def stats(context: ContextParam) -> dict[str, Any]:
    """Live figures over a sliding window of a minute."""
    engine = context.engine
    return {
        "status": context.status,
        "model": context.model_name,
        "engine": {"pid": engine.pid if engine else None, "starts": engine.starts if engine else 0},
        **context.metrics.snapshot(),
    }


@router.get("/scheduler")
async def scheduler(context: ContextParam) -> dict[str, Any]:
    """The scheduler's settings as they are now, under the names of `config.SchedulerConfig`."""
    return asdict(context.metrics.scheduler)


@router.patch("/scheduler")
async def change_scheduler(body: SchedulerPatch, context: ContextParam) -> dict[str, Any]:
    """Change what the body names, from the next iteration on; nothing restarts. Answers with all settings."""
    _, engine = context.ready()
    async with context.reconfiguring:
        config = body.apply(context.metrics.scheduler)
        try:
            await engine.reconfigure(config)
        except EngineUnavailable as error:
            raise ApiError(503, str(error), code="engine_unavailable", retry_after=LOADING_RETRY_SECONDS) from None
        context.metrics.scheduler = config
    return asdict(config)


@router.get("/", response_class=FileResponse, include_in_schema=False)
async def dashboard() -> FileResponse:
    return FileResponse(Path(__file__).with_name("dashboard.html"), media_type="text/html")
