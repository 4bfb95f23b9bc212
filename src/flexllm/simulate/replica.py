"""One replica on a virtual clock: the real scheduler plans, the latency model says how long that takes, tokens are made up.

What is simulated is policy and queueing. What is believed is the latency model: a result is as good as its figures.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import INTERACTIVE, FinetuneJob, JobStatus, Request, SamplingParams, StepPlan, StepResult, TokenLogprob, TokenOutput
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget
from flexllm.scheduler.latency import LatencyModel
from flexllm.scheduler.scheduler import HybridTokenScheduler
from flexllm.simulate.iteration import Iteration
from flexllm.simulate.workload import Arrival

TOKEN = TokenLogprob(1, 0.0)  # every sampled token
KINDS = ("inference", "mixed", "finetuning", "idle")


@dataclass(frozen=True)
class Machine:
    """What a replica runs on: the seconds of its iterations and its memory."""

    latency: LatencyModel
    num_blocks: int  # K/V pages
    block_size: int = 16  # tokens per page
    finetune_bytes: int = 0  # saved activations of training sequences


@dataclass(slots=True)
class RequestRecord:
    """What became of a request. Times in seconds; `ttft` counts from its arrival, queueing included."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    priority: str = INTERACTIVE
    replica: int = 0
    refused: bool = False  # the queue was full, or it could never fit
    tokens: int = 0  # sampled so far
    first: float = math.inf
    last: float = math.inf
    max_gap: float = 0.0  # between two tokens

    @property
    def finished(self) -> bool:
        return self.tokens == self.output_tokens

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 if there is none."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def attains(self, slo: SLO) -> bool:
        return self.finished and self.ttft <= slo.ttft and self.tpot <= slo.tpot


@dataclass
class Replica:
    """A scheduler, its memory and its clock. The jobs are copied, so that replicas may be given the same ones.

    `noise` is the standard deviation of the log of (seconds taken / seconds by the model); the scheduler has to learn of it
    like a real one does, from what it observes.
    """

    machine: Machine
    config: SchedulerConfig
    jobs: Iterable[FinetuneJob] = ()
    index: int = 0
    seconds: float = math.inf  # finetuning and time are counted from 0 until then
    noise: float = 0.0
    seed: int = 0
    check: bool = False  # the scheduler's integrity after every iteration: slow
    now: float = 0.0  # when the iteration under way ends; may begin below 0: jobs are then under way when counting begins
    under_way: Iteration | None = None
    load: int = 0  # tokens of the requests here, prompts and outputs so far
    iterations: int = 0
    finetune_tokens: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))  # seconds by kind of iteration

    def __post_init__(self) -> None:
        self._rng = random.Random(f"{self.seed}:{self.index}")
        self._live: dict[str, RequestRecord] = {}
        pool = BlockPool(self.machine.num_blocks, self.machine.block_size)
        belief = copy.deepcopy(self.machine.latency)
        self.scheduler = HybridTokenScheduler(self.config, pool, belief, ByteBudget(self.machine.finetune_bytes))
        if self.config.mode != "inference":
            for job in self.jobs:
                self.scheduler.add_job(replace(job, group=[], status=JobStatus.QUEUED))

    @property
    def serves(self) -> bool:
        return self.config.mode != "finetune"

    def add(self, number: int, arrival: Arrival) -> RequestRecord:
        """A request comes, not before the iteration under way began. If it finetunes it is cut short: `now` may go back, but not
        beyond the arrival."""
        if self.under_way is not None and arrival.time < self.now:
            self.under_way = self.under_way.interrupted(arrival.time, self.machine.latency, self.config.patience)
            self.now = self.under_way.end
        self.now = max(self.now, arrival.time)
        record = RequestRecord(arrival.time, arrival.prompt_tokens, arrival.output_tokens, arrival.adapter, arrival.priority, self.index)
        prompt, sampling = [1] * arrival.prompt_tokens, SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
        try:
            self.scheduler.add_request(Request(str(number), prompt, sampling, arrival.time, arrival.adapter, arrival.priority))
        except ValueError:
            record.refused = True
        else:
            self._live[str(number)] = record
            self.load += arrival.prompt_tokens
        return record

    def step(self) -> bool:
        """`now` the iteration under way ends, and the next begins; False if the scheduler had nothing to run."""
        self._end()
        return self._begin()

    def finish(self) -> None:
        """Run to the end of the span, and on until the last request is answered."""
        self._end()
        while (self._live or self.now < self.seconds) and self._begin():
            self._end()
        assert not self._live, "the scheduler has requests and plans nothing"

    def _begin(self) -> bool:
        plan = self.scheduler.schedule(self.now)
        if plan.is_empty:
            return False
        factor = self._rng.lognormvariate(0.0, self.noise) if self.noise else 1.0
        self.under_way = Iteration.begin(plan, self.now, factor, self.machine.latency)
        self.now = self.under_way.end
        return True

    def _end(self) -> None:
        if self.under_way is None:
            return
        plan, start, end = self.under_way.plan, self.under_way.start, self.under_way.end
        self.under_way = None
        tokens = {request.id: TOKEN for request, _, _, sample in plan.inference if sample}
        self._book(self.scheduler.update(plan, StepResult(tokens, start=start, end=end)), end)
        if self.check:
            self.scheduler.check_integrity()
        if (counted := min(end, self.seconds) - max(start, 0.0)) > 0:
            self.busy[_kind(plan)] += counted
            self.finetune_tokens += _tokens(plan) * counted / (end - start)
        self.iterations += 1

    def _book(self, outputs: Iterable[TokenOutput], now: float) -> None:
        for output in outputs:
            record = self._live[output.request_id]
            if record.tokens == 0:
                record.first = now
            elif now - record.last > record.max_gap:
                record.max_gap = now - record.last
            record.last = now
            record.tokens += 1
            self.load += 1
            if output.finish_reason is not None:
                del self._live[output.request_id]
                self.load -= record.prompt_tokens + record.tokens


def _tokens(plan: StepPlan) -> float:
    """Training tokens: half of one when it goes forward, half, layer by layer, when it comes back. The mean over both phases of what the
    server counts as flexllm:finetune_tokens_total: whole sequences would come in lumps of seconds."""
    forward = sum([window.rows for window in plan.windows if window.sequence.train])
    backward = sum([item.rows * item.num_layers / (item.job.num_layers - item.job.lowest_layer) for item in plan.backward])
    return (forward + backward) / 2


def _kind(plan: StepPlan) -> str:
    if not plan.inference:
        return "finetuning"
    return "mixed" if plan.windows or plan.backward or plan.optimizer_steps else "inference"
