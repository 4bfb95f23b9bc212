"""From a checkpoint on disk to a model that requests may name."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from flexllm.core import JobEvent
from flexllm.server import protocol
from flexllm.server.engine_client import EngineUnavailable
from flexllm.server.store import AdapterRecord, CheckpointRecord, EventRecord, JobRecord

if TYPE_CHECKING:
    from flexllm.server.context import Context

logger = logging.getLogger("flexllm.server")

ORGANIZATION = "local"  # the middle of a fine-tuned model's name


class Publisher:
    def __init__(self, context: Context) -> None:
        self._context, self._store = context, context.store

    def final_name(self, job: JobRecord) -> str:
        """`ft:<base>:<org>:<suffix>:<id>`; the id is the random end of the job's."""
        return f"ft:{self._context.model_name}:{ORGANIZATION}:{job.suffix or ''}:{job.id[-10:]}"

    async def publish(self, job: JobRecord, event: JobEvent, if_known: bool = True) -> None:
        """Serve a checkpoint, the last one under the job's own name. A known one is loaded again, if wanted, but not announced."""
        assert event.path is not None
        final = event.step == event.total_steps
        name = self.final_name(job) if final else f"{self.final_name(job)}:ckpt-step-{event.step}"
        known = self._store.adapters.get(name) is not None
        if known and not if_known:
            return
        await self._register(name, event.path)
        if known:
            return
        now = int(time.time())
        metrics: dict[str, float | None] = {"step": event.step, "train_loss": event.loss, "train_mean_token_accuracy": event.token_accuracy}
        self._store.adapters.insert(AdapterRecord(id=name, created_at=now, path=event.path, job_id=job.id))
        self._store.checkpoints.insert(
            CheckpointRecord(
                id=self._store.new_id("ftckpt"), created_at=now, job_id=job.id, model=name, step_number=event.step, metrics=metrics
            )
        )
        message = f"Checkpoint created at step {event.step}: {name}"
        self._store.events.insert(EventRecord(id=self._store.new_id("ftevent"), created_at=now, job_id=job.id, message=message))

    def add_validation(self, job: JobRecord, event: JobEvent) -> None:
        """The validation pass after a step follows its checkpoint."""
        for checkpoint in self._store.checkpoints.all(owner=job.id):
            if checkpoint.step_number == event.step:
                checkpoint.metrics |= {"valid_loss": event.loss, "valid_mean_token_accuracy": event.token_accuracy}
                self._store.checkpoints.update(checkpoint)

    async def register_all(self) -> None:
        """Tell a fresh engine process every adapter that is served."""
        for adapter in list(self._store.adapters.all()):
            await self._register(adapter.id, adapter.path)

    async def _register(self, name: str, path: str) -> None:
        """Without an engine it happens when there is one; an adapter that cannot be loaded must not stop the others."""
        if self._context.engine is None:
            return
        try:
            await self._context.engine.call(protocol.RegisterAdapter, name=name, path=path)
        except EngineUnavailable:
            pass
        except (ValueError, RuntimeError) as error:
            logger.error("adapter %s cannot be served: %s", name, error)
