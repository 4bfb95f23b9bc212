"""What the handlers share: settings, the served model, the store, the engine, the metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

from flexllm.config import EngineConfig
from flexllm.model.config import ModelConfig
from flexllm.server.engine_client import EngineClient, EngineState
from flexllm.server.engine_process import EngineFactory, build_engine
from flexllm.server.errors import ApiError, not_found
from flexllm.server.metrics import Metrics
from flexllm.server.shelf import FileShelf
from flexllm.server.store import AdapterRecord, Store

if TYPE_CHECKING:
    from flexllm.model.tokenizer import Tokenizer
    from flexllm.server.jobs import JobService

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
LOADING_RETRY_SECONDS = 5


@dataclass(frozen=True)
class Settings:
    engine: EngineConfig
    api_key: str | None = None
    served_model_name: str | None = None  # None: from the model's folder, file or hub name
    enable_adapter_loading: bool = False
    adapter_dir: Path | None = None  # the one folder that adapters may be loaded from
    max_upload_bytes: int = 1 << 30
    build_engine: EngineFactory = build_engine  # runs in the engine process

    @property
    def model_name(self) -> str:
        ref = self.engine.model
        if self.served_model_name or ref is None:
            return self.served_model_name or DEFAULT_MODEL_NAME
        path = Path(ref)
        if not path.exists():
            return ref  # a hub id
        return path.stem if path.suffix == ".gguf" else path.resolve().name


@dataclass(frozen=True)
class ServedModel:
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    max_model_len: int

    @staticmethod
    def load(config: EngineConfig) -> ServedModel:
        """Resolves, and if need be fetches, the model. Slow: seconds, or minutes with a download. Raises ValueError."""
        from flexllm.model.loader import resolve_model
        from flexllm.model.tokenizer import Tokenizer

        folder = resolve_model(config.model)
        model_config = ModelConfig.from_hf(folder)
        return ServedModel(folder, model_config, Tokenizer(folder), min(config.max_model_len or model_config.max_len, model_config.max_len))


@dataclass
class Context:
    """`model` and `engine` are filled while the server starts, once the model's folder is known."""

    settings: Settings
    store: Store
    shelf: FileShelf
    metrics: Metrics
    finetuning: JobService = field(init=False)
    model: ServedModel | None = None
    engine: EngineClient | None = None
    failure: str | None = None  # why start-up failed, for good
    draining: bool = False
    reconfiguring: asyncio.Lock = field(default_factory=asyncio.Lock)  # changes of the scheduler's settings, one at a time
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        return self.settings.model_name

    @property
    def status(self) -> str:
        """loading | ready | draining | dead"""
        if self.draining:
            return "draining"
        if self.failure is not None:
            return EngineState.DEAD.value
        return (self.engine.state if self.engine is not None else EngineState.LOADING).value

    def ready(self) -> tuple[ServedModel, EngineClient]:
        """What it takes to generate; 503 while there is nothing to generate with."""
        if self.status != EngineState.READY or self.model is None or self.engine is None:
            raise ApiError(503, f"the engine is {self.status}", code=f"engine_{self.status}", retry_after=LOADING_RETRY_SECONDS)
        return self.model, self.engine

    def find_model(self, name: str) -> AdapterRecord | None:
        """The adapter of that name, None for the base model; 404 for anything else."""
        if name == self.model_name:
            return None
        adapter = self.store.adapters.get(name)
        if adapter is None:
            raise not_found("model", name, param="model", code="model_not_found")
        return adapter

    async def close(self) -> None:
        if self.engine is not None:
            await self.engine.stop()
        await self.finetuning.close()
        self.store.close()


def get_context(request: Request) -> Context:
    return request.app.state.context
