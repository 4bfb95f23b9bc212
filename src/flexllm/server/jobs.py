"""Finetuning jobs from creation to the served adapter. What is decided is stored first; the engine can always be told again.

A job's data is validated at upload and tokenized here, in a thread. Then the engine trains it; its events, in order, move
the stored record on. When the engine (or this process) starts again, every stored job that is neither final nor paused
is handed to it once more and goes on from its last durable step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexllm.config import JobSpec
from flexllm.core import JobEvent, JobStatus
from flexllm.finetune.step_log import read_log
from flexllm.server import protocol
from flexllm.server.engine_client import EngineOverloaded, EngineUnavailable
from flexllm.server.errors import ApiError, bad_request
from flexllm.server.job_log import JobLog
from flexllm.server.publish import Publisher
from flexllm.server.store import JobRecord

if TYPE_CHECKING:
    from flexllm.server.context import Context, ServedModel

logger = logging.getLogger("flexllm.server")

CRASHES = 3  # engine deaths in a row, without a step between, after which a job is held to be their cause


class JobService:
    """Runs on the event loop; at most one task prepares a given job, and one task handles all engine events."""

    def __init__(self, context: Context, folder: Path) -> None:
        self._context, self._store, self._folder = context, context.store, folder
        self._log = JobLog(context.store)
        self._publisher = Publisher(context)
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._submitted: set[str] = set()  # jobs the engine has
        self._crashes: dict[str, int] = {}
        self._consumer: asyncio.Task[None] | None = None

    # -------------------------------------------------------------------------------------------------------- lifetime
    def start(self) -> None:
        """Once the model is known: data can be tokenized from here on."""
        self._consumer = asyncio.create_task(self._consume(), name="job events")
        for job in list(self.active_jobs()):
            self._context.metrics.restore_job(job)
            if not job.prepared:
                self._prepare_in_background(job)

    async def close(self) -> None:
        tasks = [task for task in (self._consumer, *self._preparing.values()) if task is not None]
        if self._consumer is not None:
            # What the engine said last has been received; handle it before going.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._events.join(), timeout=5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def engine_ready(self) -> None:
        """A fresh engine process knows nothing: give it the adapters, then the jobs."""
        await self._publisher.register_all()
        for job in list(self.active_jobs()):
            await self._catch_up(job)
            await self._submit(job.id)

    def engine_lost(self) -> None:
        for job_id in self._submitted:
            job = self._store.jobs.get(job_id)
            if job is None or job.status != "running":
                continue
            self._crashes[job_id] = self._crashes.get(job_id, 0) + 1
            if self._crashes[job_id] >= CRASHES:
                self._fail(job, "engine_crashed", f"the engine died {CRASHES} times while running this job")
        self._submitted.clear()

    def on_event(self, event: JobEvent) -> None:
        self._events.put_nowait(event)

    def active_jobs(self) -> Iterator[JobRecord]:
        """Those that may still run, oldest first."""
        for status in ("validating_files", "queued", "running", "paused"):
            yield from self._store.jobs.all(owner=status)

    # -------------------------------------------------------------------------------------------------- what users do
    def create(self, job: JobRecord) -> None:
        self._store.jobs.insert(job, durable=True)
        self._log.message(job.id, f"Created fine-tuning job: {job.id}")
        self._prepare_in_background(job)

    async def cancel(self, job: JobRecord) -> JobRecord:
        if job.is_final:
            raise bad_request(f"job {job.id} has {job.status}; it cannot be cancelled", code="invalid_job_state")
        await self._tell_engine(protocol.CancelJob, job.id)
        self._submitted.discard(job.id)
        job = self._require(job.id)
        if not job.is_final:  # it may have ended meanwhile
            self._finish(job, "cancelled")
            self._log.message(job.id, "The job was cancelled")
        return job

    async def pause(self, job: JobRecord) -> JobRecord:
        if job.is_final or job.status == "paused":
            raise bad_request(f"job {job.id} is {job.status}; it cannot be paused", code="invalid_job_state")
        await self._tell_engine(protocol.PauseJob, job.id)
        job = self._require(job.id)
        if not job.is_final:
            self._set_status(job, "paused")
            self._log.message(job.id, "The job was paused")
        return job

    async def resume(self, job: JobRecord) -> JobRecord:
        if job.status != "paused":
            raise bad_request(f"job {job.id} is {job.status}; only a paused job can be resumed", code="invalid_job_state")
        if job.id in self._submitted:
            await self._tell_engine(protocol.ResumeJob, job.id)
            self._set_status(job, "running")
        else:
            self._set_status(job, "queued" if job.prepared else "validating_files")
            if not job.prepared and job.id not in self._preparing:
                self._prepare_in_background(job)
            await self._submit(job.id)
        self._log.message(job.id, "The job was resumed")
        return self._require(job.id)

    # ----------------------------------------------------------------------------------------------------- preparation
    def _prepare_in_background(self, job: JobRecord) -> None:
        if self._context.model is None:
            return  # start() comes back to it
        task = asyncio.create_task(self._prepare(job.id, self._context.model), name=f"prepare {job.id}")
        self._preparing[job.id] = task
        task.add_done_callback(lambda _: self._preparing.pop(job.id, None))

    async def _prepare(self, job_id: str, model: ServedModel) -> None:
        job = self._require(job_id)
        for param, file_id, target in (
            ("training_file", job.training_file, self._train_path(job_id)),
            ("validation_file", job.validation_file, self._valid_path(job_id)),
        ):
            if file_id is None:
                continue
            self._log.message(job_id, f"Validating {param.replace('_', ' ')}: {file_id}")
            try:
                await asyncio.to_thread(self._tokenize, job, file_id, target, model)
            except (ValueError, OSError) as error:
                job = self._require(job_id)
                if not job.is_final:
                    self._fail(job, f"invalid_{param}" if isinstance(error, ValueError) else "storage_error", str(error), param)
                return
        job = self._require(job_id)  # it may have been paused or cancelled meanwhile
        if job.is_final:
            self._remove_data(job_id)
            return
        job.prepared = True
        self._set_status(job, "queued" if job.status == "validating_files" else job.status)
        self._log.message(job_id, "Files validated, moving job to queued state")
        await self._submit(job_id)

    def _tokenize(self, job: JobRecord, file_id: str, target: Path, model: ServedModel) -> None:
        """Blocks for as long as the data is big."""
        from flexllm.finetune.data import tokenize_file

        config = job.finetune
        length = min(config.max_seq_length, model.max_model_len)
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset, report = tokenize_file(self._context.shelf.path(file_id), model.tokenizer, length, config.truncate)
        dataset.save(target)
        if report.truncated or report.too_long or report.unlabelled:
            self._log.message(
                job.id,
                f"{file_id}: of {report.examples} examples {report.truncated} were cut to {length} tokens, "
                f"{report.too_long} left out as longer, {report.unlabelled} left out for want of anything to learn",
                level="warn",
            )

    # ----------------------------------------------------------------------------------------------------- the engine
    async def _submit(self, job_id: str) -> None:
        """Hand a queued (or, after a restart, running) job to the engine; without one it waits for `engine_ready`."""
        job, engine = self._require(job_id), self._context.engine
        if (
            engine is None
            or engine.info is None
            or job_id in self._submitted
            or not job.prepared
            or job.status not in ("queued", "running")
        ):
            return
        self._submitted.add(job_id)
        try:
            await engine.call(protocol.AddJob, spec=self._spec(job))
        except EngineOverloaded as error:
            self._submitted.discard(job_id)
            self._log.message(job_id, f"The job waits: {error}", level="warn")
            return
        except EngineUnavailable:
            self._submitted.discard(job_id)
            return
        except (ValueError, RuntimeError) as error:
            self._submitted.discard(job_id)
            job = self._require(job_id)
            if not job.is_final:
                self._fail(job, "job_refused", str(error))
            return
        job = self._require(job_id)
        if job.status == "queued":
            self._set_status(job, "running")
            self._log.message(job_id, "Fine-tuning job started")

    async def _catch_up(self, job: JobRecord) -> None:
        """Announce what the last engine wrote but could not tell: checkpoints appear on disk whole or not at all, and say what the steps
        before them came to."""
        folders = {int(path.name.rpartition("-")[2]): path for path in self._output_dir(job.id).glob("checkpoint-*")}
        for step, folder in sorted(folders.items()):
            done = [event for event in read_log(folder) if event.job_id == job.id]
            for event in done:
                await self._handle(event)
            last = done[-1] if done else JobEvent(job.id, "step", step, total_steps=job.total_steps)
            await self._publisher.publish(job, replace(last, kind="checkpoint", path=str(folder)), if_known=False)
        job = self._require(job.id)
        if job.total_steps and job.total_steps in folders and not job.is_final:
            self._succeed(job, job.trained_tokens or 0)

    async def _submit_waiting(self) -> None:
        """A job has ended: another one may fit now."""
        for job in list(self._store.jobs.all(owner="queued")):
            await self._submit(job.id)

    async def _tell_engine(self, command: type[Any], job_id: str) -> None:
        """If the engine has the job, that is; if it does not, the stored status is all there is to change."""
        if job_id in self._submitted and self._context.engine is not None:
            try:
                await self._context.engine.call(command, job_id=job_id)
            except (EngineUnavailable, ValueError):  # gone with its process; or ended in this moment
                pass
            except (EngineOverloaded, RuntimeError) as error:
                raise ApiError(500, str(error), code="engine_error") from None

    def _spec(self, job: JobRecord) -> JobSpec:
        return JobSpec(
            id=job.id,
            train_path=str(self._train_path(job.id)),
            valid_path=str(self._valid_path(job.id)) if job.validation_file else None,
            output_dir=str(self._output_dir(job.id)),
            finetune=job.finetune,
            peft=job.peft,
            init_adapter=job.init_adapter,
            tenant=job.tenant,
            resume=True,
        )

    async def _consume(self) -> None:
        while True:
            event = await self._events.get()
            try:
                await self._handle(event)
            except Exception:
                logger.exception("cannot handle an event of %s", event.job_id)
            finally:
                self._events.task_done()

    async def _handle(self, event: JobEvent) -> None:
        job = self._store.jobs.get(event.job_id)
        if job is None or job.is_final:
            return
        if event.kind == "step" and event.step <= job.step:
            return  # it was known before the engine died; now it is told again, or was done again
        self._context.metrics.job_event(event)
        if event.kind == "step":
            self._crashes.pop(job.id, None)
            self._log.step(job, event)
        elif event.kind == "validation":
            self._log.validation(job, event)
            self._publisher.add_validation(job, event)
        elif event.kind == "checkpoint" and event.path is not None:
            await self._publisher.publish(job, event)
        elif event.status is JobStatus.SUCCEEDED:
            self._succeed(job, event.tokens)
        elif event.status is JobStatus.FAILED:
            self._submitted.discard(job.id)
            self._fail(job, "training_failed", event.message)
        if event.status is not None and event.status.is_final:
            await self._submit_waiting()

    # ---------------------------------------------------------------------------------------------------------- the end
    def _succeed(self, job: JobRecord, tokens: int) -> None:
        """Follows the last checkpoint."""
        self._submitted.discard(job.id)
        final = self._publisher.final_name(job)
        try:
            job.result_files = [self._context.shelf.add_result("step_metrics.csv", self._log.result_csv(job.id)).id]
        except OSError as error:
            self._log.message(job.id, f"The result file could not be written: {error}", level="error")
        job.fine_tuned_model = final
        job.trained_tokens = max(tokens, job.trained_tokens or 0)
        self._log.message(job.id, f"New fine-tuned model created: {final}")
        self._finish(job, "succeeded")
        self._log.message(job.id, "The job has successfully completed")

    def _fail(self, job: JobRecord, code: str, message: str, param: str | None = None) -> None:
        job.error = {"code": code, "message": message, "param": param}
        self._finish(job, "failed")
        self._log.message(job.id, f"The job failed: {message}", level="error")

    def _finish(self, job: JobRecord, status: str) -> None:
        job.finished_at = int(time.time())
        self._set_status(job, status)
        self._crashes.pop(job.id, None)
        self._remove_data(job.id)

    def _set_status(self, job: JobRecord, status: str) -> None:
        job.status = status
        self._store.jobs.update(job, durable=True)
        self._context.metrics.job_status(job.id, status)

    def _remove_data(self, job_id: str) -> None:
        """The tokenized data; the engine has read it, and a final job is not run again."""
        self._train_path(job_id).unlink(missing_ok=True)
        self._valid_path(job_id).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------------ places
    def _require(self, job_id: str) -> JobRecord:
        job = self._store.jobs.get(job_id)
        assert job is not None, f"{job_id} vanished: jobs are never deleted"
        return job

    def _train_path(self, job_id: str) -> Path:
        return self._folder / job_id / "train.npz"

    def _valid_path(self, job_id: str) -> Path:
        return self._folder / job_id / "valid.npz"

    def _output_dir(self, job_id: str) -> Path:
        return self._folder / job_id / "output"
