"""The trainer carries out the finetuning part of a plan: windows' losses, backward slices, optimizer steps, checkpoints."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexllm.batch import FusedBatch
from flexllm.core import FinetuneJob, JobEvent, JobStatus, Sequence, StepPlan, TokenWindow, WindowLoss
from flexllm.finetune.backward import run_slice
from flexllm.finetune.checkpoint import BackgroundWriter
from flexllm.finetune.job import LossSums, TrainingJob
from flexllm.finetune.window import finish_forward
from flexllm.memory.activations import ActivationStore, SequenceState
from flexllm.memory.kv_cache import KVCache
from flexllm.model.decoder import Decoder
from flexllm.peft.pool import AdapterPool

RESUME_INTERVAL = 20.0  # seconds between durable states of a running job: what a crash may cost

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer:
    model: Decoder
    cache: KVCache
    pool: AdapterPool
    jobs: dict[str, TrainingJob] = field(default_factory=dict)
    states: dict[Sequence, SequenceState] = field(default_factory=dict)
    events: queue.SimpleQueue[JobEvent] = field(default_factory=queue.SimpleQueue)  # also filled by the writer's thread
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    _sums: dict[Sequence, LossSums] = field(default_factory=dict)

    # ----------------------------------------------------------------------------------------------------- iterations
    def begin(self, plan: StepPlan) -> None:
        """Drop what the plan takes back, and make a state for every sequence that starts."""
        for sequence in plan.released:
            self.drop(sequence)
        for job in plan.restarted:
            self.jobs[job.id].ledger.zero()
        for window in plan.windows:
            if window.start == window.layer == 0:
                self.states[window.sequence] = self._new_state(window)
                self._sums[window.sequence] = LossSums()
            state = self.states[window.sequence]
            if window.layer == 0:
                state.under_way = None
            assert window.layer == 0 or (state.under_way is not None and window.layer == state.reached)

    def _new_state(self, window: TokenWindow) -> SequenceState:
        sequence = window.sequence
        job = self.jobs[sequence.job.id]
        ids, labels = job.example(sequence)
        store = ActivationStore(sequence.length, self.model.dtype, self.model.device)
        targets = torch.from_numpy(labels.astype("int64")).to(self.model.device)
        program = job.program(sequence.level) if sequence.train else None
        return SequenceState(sequence, ids, targets, job.slot, program, store, job.dropout_seed(sequence))

    def finish_forward(
        self, hidden: Tensor, batch: FusedBatch, interrupted: Callable[[], bool] = lambda: False
    ) -> tuple[WindowLoss, ...] | None:
        """hidden [N, d]; see finetune/window.py. None: the windows did not come to their end, and can go on from where they are."""
        losses = finish_forward(self.model, hidden, batch, interrupted)
        if losses is None:
            return None
        for loss in losses:
            self._sums[loss.sequence].add(loss.loss_sum, loss.labels, loss.correct)
        for rows in batch.windows:
            sequence = rows.window.sequence
            rows.state.finish_window(rows.window.rows)
            if sequence.train:
                self.jobs[sequence.job.id].phase_tokens["forward"] += rows.window.rows
            elif rows.window.end == sequence.length:
                self._finish_validation(sequence)
        return losses

    def run_backward(self, plan: StepPlan, interrupted: Callable[[], bool] = lambda: False) -> int:
        """Slices until `interrupted`; returns how many were run."""
        for done, work in enumerate(plan.backward):
            if interrupted():
                return done
            training = self.jobs[work.job.id]
            run_slice(self.model, self.cache, self.pool, work, self.states, training.ledger)
            training.phase_tokens["backward"] += work.rows * work.num_layers / (work.job.num_layers - work.job.lowest_layer)
        return len(plan.backward)

    def step_optimizers(self, jobs: tuple[FinetuneJob, ...], now: float) -> None:
        for job in jobs:
            training = self.jobs[job.id]
            sums = LossSums()
            for sequence in job.group:
                part = self._sums[sequence]
                sums.add(part.loss, part.labels, part.correct)
                self.drop(sequence)
            try:
                event = training.optimizer_step(sums)
            except FloatingPointError as error:
                self.events.put(self._status(training, JobStatus.FAILED, str(error)))
                continue
            self.events.put(event)
            if training.checkpoint_due(event.step):
                self._checkpoint(training, event)
            if now - training.last_saved > RESUME_INTERVAL:
                self.save_resume(training, now)

    def drop(self, sequence: Sequence) -> None:
        self.states.pop(sequence, None)
        self._sums.pop(sequence, None)

    def _finish_validation(self, sequence: Sequence) -> None:
        training = self.jobs[sequence.job.id]
        total, part = training.valid_sums, self._sums[sequence]
        total.add(part.loss, part.labels, part.correct)
        total.sequences += 1
        self.drop(sequence)
        if total.sequences == len(sequence.job.valid_lengths):
            job = sequence.job
            self.events.put(
                JobEvent(
                    job.id,
                    "validation",
                    job.step,
                    epoch=job.step / job.steps_per_epoch,
                    total_steps=job.total_steps,
                    loss=total.mean_loss,
                    token_accuracy=total.accuracy,
                    labels=total.labels,
                )
            )
            training.valid_sums = LossSums()

    # ----------------------------------------------------------------------------------------------------------- jobs
    def add(self, training: TrainingJob) -> None:
        """A job that goes on from a durable state first tells its last steps again, in case nobody heard of them."""
        self.jobs[training.job.id] = training
        for event in training.told:
            self.events.put(event)

    def remove(self, job_id: str) -> None:
        """Forget a job; what it holds in memory is released, that of sequences that wait for their optimizer step too."""
        for sequence in [s for s in self.states if s.job.id == job_id]:
            self.drop(sequence)
        self.pool.free(self.jobs.pop(job_id).slot)

    def finish(self, training: TrainingJob) -> None:
        """The job is done: announce it once everything it wrote is on disk."""

        def announce() -> JobEvent:
            training.remove_resume()
            return self._status(training, JobStatus.SUCCEEDED)

        self._in_background(training, announce)

    def save_resume(self, training: TrainingJob, now: float, then: JobStatus | None = None) -> None:
        """Write the job's durable state; `then` is announced once it is on disk."""
        training.last_saved = now
        tensors, meta = training.snapshot_resume()

        def write() -> JobEvent | None:
            training.write_resume(tensors, meta)
            return self._status(training, then) if then else None

        self._in_background(training, write)

    def _checkpoint(self, training: TrainingJob, event: JobEvent) -> None:
        adapter, told = training.snapshot_adapter(), tuple(training.told)

        def write() -> JobEvent:
            path = training.write_checkpoint(adapter, told)
            return JobEvent(
                training.job.id,
                "checkpoint",
                event.step,
                epoch=event.epoch,
                total_steps=event.total_steps,
                loss=event.loss,
                token_accuracy=event.token_accuracy,
                tokens=event.tokens,
                path=str(path),
            )

        self._in_background(training, write)

    def _in_background(self, training: TrainingJob, work: Callable[[], JobEvent | None]) -> None:
        """Disk never delays an iteration. A write that fails (a full disk) fails the job, not the engine."""

        def run() -> None:
            if training.write_failed:
                return
            try:
                event = work()
            except Exception as error:  # whatever the file system says, the engine goes on
                log.exception("job %s: writing failed", training.job.id)
                training.write_failed = True
                event = self._status(training, JobStatus.FAILED, f"could not write the job's files: {error}")
            if event is not None:
                self.events.put(event)

        self.writer.submit(run)

    @staticmethod
    def _status(training: TrainingJob, status: JobStatus, message: str = "") -> JobEvent:
        job = training.job
        return JobEvent(job.id, "status", job.step, total_steps=job.total_steps, tokens=training.tokens, status=status, message=message)

    def take_events(self) -> tuple[JobEvent, ...]:
        taken = []
        while True:
            try:
                taken.append(self.events.get_nowait())
            except queue.Empty:
                return tuple(taken)
