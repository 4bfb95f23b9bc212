"""Replicas behind a router, on virtual clocks: nothing but requests passes between them.

What is simulated is policy and queueing. What is believed is the latency model: a result is as good as its figures.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob
from flexllm.simulate.cluster import Router
from flexllm.simulate.replica import KINDS, Machine, Replica, RequestRecord
from flexllm.simulate.workload import Arrival


@dataclass(frozen=True)
class SimulationResult:
    """A run. `seconds`: the span that finetuning tokens and shares of time are counted over."""

    records: list[RequestRecord]
    seconds: float
    finetune_tokens: float  # half of one for its forward, half for its backward
    shares: dict[str, float]  # of the replicas' time, by kind of iteration (KINDS); they sum to 1
    iterations: int
    preemptions: int

    @property
    def finetune_rate(self) -> float:
        """Finetuning tokens per second, all replicas together."""
        return self.finetune_tokens / self.seconds if self.seconds else 0.0

    def of_class(self, priority: str) -> SimulationResult:
        """The same run, with the requests of one SLO class."""
        return replace(self, records=[r for r in self.records if r.priority == priority])

    def attainment(self, slo: SLO, class_slos: Mapping[str, SLO] | None = None) -> float:
        """Share of the requests that met both objectives, those of their class or else `slo`; refused ones did not. 1 without requests."""
        of_class = class_slos or {}
        return sum(r.attains(of_class.get(r.priority, slo)) for r in self.records) / len(self.records) if self.records else 1.0

    def summary(self, slo: SLO, class_slos: Mapping[str, SLO] | None = None) -> dict[str, float]:
        """Plain numbers, seconds and shares. Requests are judged as in `attainment`."""
        done = [r for r in self.records if r.finished]
        values = {name: [getattr(r, name) for r in done] or [0.0] for name in ("ttft", "tpot", "max_gap")}
        quantiles = {f"{name}_p{q}": float(np.percentile(v, q)) for name, v in values.items() for q in (50, 99)}
        return {
            "requests": len(self.records),
            "finished": len(done),
            "seconds": self.seconds,
            "attainment": self.attainment(slo, class_slos),
            **quantiles,
            "max_gap": max(values["max_gap"]),
            "finetune_rate": self.finetune_rate,
            **{f"share_{kind}": share for kind, share in self.shares.items()},
            "iterations": self.iterations,
            "preemptions": self.preemptions,
        }


def simulate(
    trace: Sequence[Arrival],
    jobs: Iterable[FinetuneJob],
    configs: SchedulerConfig | Sequence[SchedulerConfig],
    machine: Machine,
    *,
    seconds: float | None = None,
    warmup: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    check: bool = False,
) -> SimulationResult:
    """Offer a trace, in order of time, to replicas that each have a copy of `jobs`, until every request is answered.

    `configs`: the policy of each replica (see `fleet`), or of the only one. `seconds`: the span that finetuning is counted over, at
    least that long (default: until the last arrival). `warmup`: seconds before it in which there are jobs and no requests.
    See Replica for the rest. ValueError if there are requests and nobody to serve them.
    """
    configs = [configs] if isinstance(configs, SchedulerConfig) else configs
    span = seconds if seconds is not None else max((a.time for a in trace), default=0.0)
    jobs = list(jobs)
    replicas = [
        Replica(machine, config, jobs, index, seconds=span, noise=noise, seed=seed, check=check, now=-warmup)
        for index, config in enumerate(configs)
    ]
    records = _serve(trace, [r for r in replicas if r.serves])
    for replica in replicas:
        replica.finish()
    return _collect(replicas, records, span)


def _serve(trace: Sequence[Arrival], serving: list[Replica]) -> list[RequestRecord]:
    """Bring all replicas to each arrival's time, and the arrival to one of them."""
    if trace and not serving:
        raise ValueError("no replica serves requests")
    router = Router(len(serving))
    due = [(replica.now, i) for i, replica in enumerate(serving)]  # when each goes on; outdated where a request changed that
    records = []
    for number, arrival in enumerate(trace):
        while due and due[0][0] < arrival.time:
            now, i = heapq.heappop(due)
            if now == serving[i].now and serving[i].step():
                heapq.heappush(due, (serving[i].now, i))
            router.load[i] = serving[i].load
        i = router.choose(arrival.adapter)
        records.append(serving[i].add(number, arrival))
        router.load[i] = serving[i].load
        heapq.heappush(due, (serving[i].now, i))
    return records


def _collect(replicas: Sequence[Replica], records: list[RequestRecord], span: float) -> SimulationResult:
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
