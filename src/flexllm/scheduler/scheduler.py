"""The hybrid token scheduler: each iteration serves the requests, and finetunes in the time their deadlines leave over."""

from __future__ import annotations

from flexllm.config import SchedulerConfig
from flexllm.core import FinetuneJob, FinishReason, InferenceChunk, PlanFeatures, Request, Sequence, StepPlan, StepResult, TokenOutput
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget
from flexllm.scheduler.fill import SlackFill
from flexllm.scheduler.jobs import JobTable, Work
from flexllm.scheduler.latency import LatencyModel, features_of
from flexllm.scheduler.requests import RequestQueues

MARGIN_QUANTILE = 0.95  # of recent prediction errors: the mean of a request's iterations is what its TPOT is
MAX_MARGIN = 1.0
MARGIN_EVERY = 16  # updates between two looks at the errors
SHARED_SLICE = 0.5  # seconds of finetuning in an iteration that has rows of requests, at most


class HybridTokenScheduler:
    """Plans iterations. Call `schedule` and, when the plan has run, `update`; in between, requests and jobs may be added
    and removed. Times are on the caller's clock. Not thread-safe.

    Requests come first: they are planned exactly as if there were no finetuning, and get its pages when theirs run out.
    Finetuning is planned into the slack, the time until the earliest token deadline, and never beyond it; there is none before the
    last prompt is computed. Whoever carries out the plan may drop the rest of its finetuning when a request comes.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, latency: LatencyModel, finetune_budget: ByteBudget) -> None:
        self.config = config
        self.latency = latency
        self.starved_iterations = 0  # a job had work, the slack had no room for any of it
        self._pool = pool
        self._requests = RequestQueues(config, pool, latency)
        self._jobs = JobTable(pool, finetune_budget, config.max_sequences)
        self._margin = 0.1  # of a predicted time, for prediction errors
        self._num_updates = 0
        self._inference_streak = 0  # mode `temporal`: iterations since finetuning had its turn
        self._inference_seconds = 0.0  # predicted, of the last inference rows planned
        self._work_seconds: dict[Work, float] = {}  # the same of each piece of finetuning in the last plan

    def reconfigure(self, config: SchedulerConfig) -> None:
        """Plan by other settings from the next iteration on. ValueError for a change of one that is fixed at the start."""
        self.config.check_successor(config)
        self.config = config
        self._requests.reconfigure(config)

    # -------------------------------------------------------------------------------------------------- requests and jobs
    def add_request(self, request: Request) -> None:
        """Queue a request. ValueError if it could never fit or its id is in use, QueueFullError if too many wait."""
        self._requests.add(request)

    def abort_request(self, request_id: str) -> Request | None:
        """End a request in whatever state it is; None if there is none of that id (any more)."""
        return self._requests.remove(request_id, FinishReason.ABORT)

    def add_job(self, job: FinetuneJob) -> None:
        """Take up a job, at the optimizer step that `job.step` says. ValueError if one of its sequences could never be held."""
        self._jobs.add(job)

    def pause_job(self, job_id: str) -> None:
        """Stop giving time to a job: the next plan drops the step under way and takes its memory back. ValueError if unknown."""
        self._jobs.pause(job_id)

    def resume_job(self, job_id: str) -> None:
        """Go on with a paused job, from the last optimizer step. ValueError if unknown."""
        self._jobs.resume(job_id)

    def remove_job(self, job_id: str) -> list[Sequence]:
        """Forget a job (cancelled, failed); returns the sequences that the trainer has to drop. Unknown ids: none."""
        return self._jobs.remove(job_id)

    @property
    def has_work(self) -> bool:
        serves = self.config.mode != "finetune" and len(self._requests) > 0
        return serves or (self.config.mode != "inference" and self._jobs.has_work)

    @property
    def jobs(self) -> list[FinetuneJob]:
        """Jobs that are not finished, in the order they came."""
        return self._jobs.jobs

    @property
    def num_running(self) -> int:
        return self._requests.num_running

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    @property
    def num_preemptions(self) -> int:
        """Requests that lost their pages to others, since the start."""
        return self._requests.num_preemptions

    # ------------------------------------------------------------------------------------------------------ the iteration
    def schedule(self, now: float) -> StepPlan:
        """What the next iteration does."""
        self._jobs.drop_paused()
        if self._is_finetuning_turn(now):
            plan = self._compose((), PlanFeatures(), self._turn_seconds(), finetuning=True)
            if not plan.is_empty:
                self._inference_streak = 0
                return plan
        self._inference_streak += 1
        inference, features = self._plan_inference(now)
        return self._compose(inference, features, self._slack(now), finetuning=self.config.mode in ("coserve", "finetune"))

    def update(self, plan: StepPlan, result: StepResult) -> tuple[TokenOutput, ...]:
        """Book what an iteration did, `plan` being what of its plan was done; returns the tokens it sampled. What was removed since it was
        planned is passed over."""
        outputs = self._requests.advance(plan.inference, result)
        self._jobs.advance(plan, self._work_seconds)
        if not plan.interrupted:
            self.latency.observe(plan.features or features_of(plan), result.seconds)
        self._num_updates += 1
        if self._num_updates % MARGIN_EVERY == 0:
            self._margin = min(MAX_MARGIN, max(0.0, self.latency.error_quantile(MARGIN_QUANTILE)))
        return tuple(outputs)

    def check_integrity(self) -> None:
        """Every page and byte has exactly one owner, every request and sequence is in exactly one state."""
        self._requests.check_integrity()
        self._jobs.check_integrity()
        self._pool.check_integrity()
        held = self._requests.blocks_held() + self._jobs.blocks_held()
        assert len(held) == len(set(held)) == self._pool.num_used

    # ---------------------------------------------------------------------------------------------------------- its steps
    def _plan_inference(self, now: float) -> tuple[tuple[InferenceChunk, ...], PlanFeatures]:
        if self.config.mode == "finetune":
            return (), PlanFeatures()
        chunks = self._requests.plan(now, self._jobs.reclaim, self._jobs.reclaimable, self._in_time)
        features = self._requests.features(chunks)
        self._inference_seconds = self.latency.predict(features)
        return chunks, features

    def _slack(self, now: float) -> float:
        """Seconds that the iteration may take by prediction; `idle_slice` if nobody is here."""
        if self.config.mode == "finetune" or not len(self._requests):
            return self.config.idle_slice
        return self._in_time(self._requests.slack(now))

    def _in_time(self, seconds: float) -> float:
        """What an iteration may take by prediction if it has to end within so many seconds, prediction errors allowed for."""
        return max(0.0, seconds) / (1 + self._margin)

    def _compose(self, inference: tuple[InferenceChunk, ...], features: PlanFeatures, slack: float, finetuning: bool) -> StepPlan:
        """The plan of these inference rows and, when it is its time, of finetuning up to the slack."""
        ceiling = self.latency.predict(features) + min(self.config.idle_slice, SHARED_SLICE) if inference else slack
        fill = SlackFill(self._jobs, self.latency, features, slack, ceiling, self.config.max_window_rows, must_progress=not inference)
        turns = self._jobs.take_turns() if finetuning else []
        if turns:
            fill.give_turns(turns, share=0 if self._requests.page_blocked else max(1, self.config.max_sequences // len(turns)))
        self.starved_iterations += bool(turns) and fill.is_empty
        self._work_seconds = fill.seconds
        return StepPlan(
            inference=inference,
            windows=tuple(fill.windows),
            backward=tuple(fill.backward),
            optimizer_steps=tuple(fill.optimizer_steps),
            released=self._jobs.released(),
            restarted=self._jobs.restarted(),
            slack=slack,
            predicted=fill.predicted,
            features=fill.features,
        )

    # ------------------------------------------------------------------------------------------------------ mode temporal
    def _turn_seconds(self) -> float:
        """A finetuning turn lasts about as long as a full window."""
        rows = self.config.max_window_rows
        return self.latency.predict(PlanFeatures(rows=rows, prefill_pairs=rows * rows // 2, label_rows=rows, windows=1))

    def _is_finetuning_turn(self, now: float) -> bool:
        """Time slicing takes turns: after so many inference iterations or, when that is 0, whenever no deadline would be missed by it."""
        if self.config.mode != "temporal" or not len(self._requests):
            return self.config.mode == "temporal"
        if self.config.temporal_inference_steps > 0:
            return self._inference_streak >= self.config.temporal_inference_steps
        spare = self._in_time(self._requests.slack(now)) - self._inference_seconds
        return spare >= self._turn_seconds()
