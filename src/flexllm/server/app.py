"""The HTTP application: its routes, and what starts and ends with it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from flexllm import __version__
from flexllm.server import files, finetuning, models, serving, system
from flexllm.server.context import Context, ServedModel, Settings
from flexllm.server.engine_client import EngineClient
from flexllm.server.errors import http_error, internal_error, storage_error, validation_error
from flexllm.server.gate import Gate
from flexllm.server.jobs import JobService
from flexllm.server.metrics import Metrics
from flexllm.server.shelf import FileShelf
from flexllm.server.store import Store


def create_app(
    settings: Settings, *, on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[str], None] = lambda _: None
) -> FastAPI:
    """HTTP is up at once; the model and the engine load behind it (503 until then).

    `on_ready` is called when requests are let in, after each start of the engine; `on_failure`, with the reason, when
    there will never be an engine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context = app.state.context = open_context(settings)
        loading = asyncio.create_task(_load(context, on_ready, on_failure))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await context.close()

    app = FastAPI(title="FlexLLM", version=__version__, lifespan=lifespan)
    for module in (serving, models, files, finetuning, system):
        app.include_router(module.router)
    app.add_middleware(Gate)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(OSError, storage_error)
    app.add_exception_handler(sqlite3.OperationalError, storage_error)
    app.add_exception_handler(Exception, internal_error)
    return app


def open_context(settings: Settings) -> Context:
    state_dir = settings.engine.state_dir
    store = Store(state_dir / "flexllm.sqlite")
    shelf = FileShelf(state_dir / "files", store)
    context = Context(settings, store, shelf, Metrics(settings.engine.scheduler, settings.model_name))
    context.finetuning = JobService(context, state_dir / "jobs")
    return context


async def _load(context: Context, on_ready: Callable[[], None], on_failure: Callable[[str], None]) -> None:
    def fail(reason: str) -> None:
        context.failure = reason
        on_failure(reason)

    async def ready() -> None:
        await context.finetuning.engine_ready()
        on_ready()

    def lost() -> None:
        context.metrics.engine_lost()
        context.finetuning.engine_lost()

    config = context.settings.engine
    try:
        context.model = await asyncio.to_thread(ServedModel.load, config)
    except (ValueError, OSError) as error:
        fail(str(error))
        return
    context.finetuning.start()
    context.engine = EngineClient(
        replace(config, model=str(context.model.folder)),
        on_ready=ready,
        on_loss=lost,
        on_event=context.finetuning.on_event,
        on_stats=context.metrics.engine,
        on_dead=fail,
        build=context.settings.build_engine,
    )
    context.engine.start()
