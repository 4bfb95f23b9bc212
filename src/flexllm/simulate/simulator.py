"""One replica on a virtual clock: the real scheduler plans, the latency model says how long that takes, tokens are made up.

What is simulated is policy and queueing. What is believed is the latency model: a result is as good as its figures.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob, JobStatus, Request, SamplingParams, StepPlan, StepResult, TokenLogprob
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget
from flexllm.scheduler.latency import LatencyModel, features_of
from flexllm.scheduler.scheduler import HybridTokenScheduler
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


@dataclass(frozen=True)
class SimulationResult:
    """A run. `seconds`: the span that finetuning tokens and shares of time are counted over."""

    records: list[RequestRecord]
    seconds: float
    finetune_tokens: int  # rows of completed optimizer steps, forward and backward
    shares: dict[str, float]  # of the replicas' time, by kind of iteration (KINDS); they sum to 1
    iterations: int
    preemptions: int

    @property
    def finetune_rate(self) -> float:
        """Finetuning tokens per second, all replicas together."""
        return self.finetune_tokens / self.seconds if self.seconds else 0.0

    def attainment(self, slo: SLO) -> float:
        """Share of the requests that met both objectives; refused ones did not. 1 without requests."""
        return sum(r.attains(slo) for r in self.records) / len(self.records) if self.records else 1.0

    def summary(self, slo: SLO) -> dict[str, float]:
        """Plain numbers, seconds and shares."""
        done = [r for r in self.records if r.finished]
        values = {name: [getattr(r, name) for r in done] or [0.0] for name in ("ttft", "tpot", "max_gap")}
        quantiles = {f"{name}_p{q}": float(np.percentile(v, q)) for name, v in values.items() for q in (50, 99)}
        return {
            "requests": len(self.records),
            "finished": len(done),
            "seconds": self.seconds,
            "attainment": self.attainment(slo),
            **quantiles,
            "max_gap": max(values["max_gap"]),
            "finetune_rate": self.finetune_rate,
            **{f"share_{kind}": share for kind, share in self.shares.items()},
            "iterations": self.iterations,
            "preemptions": self.preemptions,
        }


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
    seconds: float = math.inf  # finetuning and time are counted until then
    noise: float = 0.0
    seed: int = 0
    check: bool = False  # the scheduler's integrity after every iteration: slow
    now: float = 0.0
    load: int = 0  # tokens of the requests here, prompts and outputs so far
    iterations: int = 0
    finetune_tokens: int = 0
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

    @property
    def is_serving(self) -> bool:
        """A request is here."""
        return bool(self._live)

    def add(self, number: int, arrival: Arrival) -> RequestRecord:
        """A request comes; the clock has been brought to its time (an iteration under way may have gone beyond)."""
        self.now = max(self.now, arrival.time)
        record = RequestRecord(arrival.time, arrival.prompt_tokens, arrival.output_tokens, arrival.adapter, self.index)
        sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
        try:
            self.scheduler.add_request(Request(str(number), [1] * arrival.prompt_tokens, sampling, arrival.time, arrival.adapter))
        except ValueError:
            record.refused = True
        else:
            self._live[str(number)] = record
            self.load += arrival.prompt_tokens
        return record

    def advance(self, until: float) -> None:
        """Run the iterations that begin before `until`; without work the clock jumps there."""
        while self.now < until and self.scheduler.has_work:
            if not self.step():
                break
        if not math.isinf(until):
            self.now = max(self.now, until)

    def step(self) -> bool:
        """One iteration; False if the scheduler had nothing to run."""
        plan = self.scheduler.schedule(self.now)
        if plan.is_empty:
            return False
        start, end = self.now, self.now + self._seconds_of(plan)
        tokens = {chunk.request.id: TOKEN for chunk in plan.inference if chunk.sample}
        if end <= self.seconds:
            self.finetune_tokens += sum(s.length for job in plan.optimizer_steps for s in job.group)
        for output in self.scheduler.update(plan, StepResult(tokens, start=start, end=end)):
            self._book(output.request_id, end, ended=output.finish_reason is not None)
        if self.check:
            self.scheduler.check_integrity()
        self.busy[_kind(plan)] += max(0.0, min(end, self.seconds) - start)
        self.iterations += 1
        self.now = end
        return True

    def _seconds_of(self, plan: StepPlan) -> float:
        seconds = self.machine.latency.predict(features_of(plan))
        return seconds * self._rng.lognormvariate(0.0, self.noise) if self.noise else seconds

    def _book(self, request_id: str, now: float, ended: bool) -> None:
        record = self._live[request_id]
        if record.tokens == 0:
            record.first = now
        else:
            record.max_gap = max(record.max_gap, now - record.last)
        record.last = now
        record.tokens += 1
        self.load += 1
        if ended:
            del self._live[request_id]
            self.load -= record.prompt_tokens + record.tokens


def simulate(
    trace: Sequence[Arrival],
    jobs: Iterable[FinetuneJob],
    config: SchedulerConfig,
    machine: Machine,
    *,
    seconds: float | None = None,
    noise: float = 0.0,
    seed: int = 0,
    check: bool = False,
) -> SimulationResult:
    """Offer a trace to one replica that also has `jobs`, until every request is answered.

    `seconds`: the span that finetuning is counted over, at least that long (default: until the last arrival). See Replica for
    the rest.
    """
    span = seconds if seconds is not None else max((a.time for a in trace), default=0.0)
    replica = Replica(machine, config, jobs, seconds=span, noise=noise, seed=seed, check=check)
    records = []
    for number, arrival in enumerate(trace):
        replica.advance(arrival.time)
        records.append(replica.add(number, arrival))
    finish(replica, span)
    return collect([replica], records, span)


def finish(replica: Replica, span: float) -> None:
    """Run a replica to the end of the span, and on until its last request is answered."""
    replica.advance(span)
    while replica.is_serving and replica.step():
        pass
    assert not replica.is_serving, "the scheduler has requests and plans nothing"


def collect(replicas: Sequence[Replica], records: list[RequestRecord], span: float) -> SimulationResult:
    total = span * len(replicas) or math.inf
    shares = {kind: sum(r.busy[kind] for r in replicas) / total for kind in KINDS}
    shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    return SimulationResult(
        records,
        span,
        finetune_tokens=sum(r.finetune_tokens for r in replicas),
        shares=shares,
        iterations=sum(r.iterations for r in replicas),
        preemptions=sum(r.scheduler.num_preemptions for r in replicas),
    )


def _kind(plan: StepPlan) -> str:
    if not plan.inference:
        return "finetuning"
    return "mixed" if plan.windows or plan.backward or plan.optimizer_steps else "inference"
