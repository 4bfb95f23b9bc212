"""Many replicas behind a router, each with a scheduler and a clock of its own: nothing but requests passes between them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from flexllm.config import SchedulerConfig
from flexllm.core import FinetuneJob
from flexllm.simulate.simulator import Machine, Replica, SimulationResult, collect, finish
from flexllm.simulate.workload import Arrival

PATIENCE = 4096  # tokens that a replica may be ahead of the least loaded one before its adapters' requests go elsewhere


class Router:
    """The replica with the fewest outstanding tokens; requests of an adapter stay with the one that had it last, if that one is
    not much busier. A router knows no output lengths, so what is outstanding are prompts and the tokens so far."""

    def __init__(self, replicas: int) -> None:
        self.load = np.zeros(replicas)
        self.moves = 0  # an adapter came to a replica that it was not at
        self._home: dict[str, int] = {}

    def choose(self, adapter: str | None) -> int:
        least = int(self.load.argmin())
        if adapter is None:
            return least
        home = self._home.get(adapter)
        if home is not None and self.load[home] <= self.load[least] + PATIENCE:
            return home
        self.moves += 1
        self._home[adapter] = least
        return least


def fleet(split: str, replicas: int, config: SchedulerConfig, finetuning: int = 0) -> list[SchedulerConfig]:
    """Policies of `replicas` machines. "coserve" and "temporal": all serve and finetune; "separate": the last `finetuning` of them
    finetune and do nothing else, the others only serve; "inference": all only serve. ValueError for any other split."""
    if split == "separate":
        if not 0 <= finetuning <= replicas:
            raise ValueError(f"finetuning must be between 0 and the {replicas} replicas, got {finetuning}")
        modes = ["inference"] * (replicas - finetuning) + ["finetune"] * finetuning
    elif split in ("coserve", "temporal", "inference"):
        modes = [split] * replicas
    else:
        raise ValueError(f"split must be one of coserve, temporal, separate, inference, got {split!r}")
    return [replace(config, mode=mode) for mode in modes]


def simulate_cluster(
    trace: Sequence[Arrival],
    jobs: Iterable[FinetuneJob],
    configs: Sequence[SchedulerConfig],
    machine: Machine,
    *,
    seconds: float | None = None,
    noise: float = 0.0,
    seed: int = 0,
    check: bool = False,
) -> SimulationResult:
    """Offer a trace to replicas of these policies (see `fleet`), each finetuning with its own copy of `jobs`; as `simulate`.

    ValueError if there are requests and nobody to serve them.
    """
    span = seconds if seconds is not None else max((a.time for a in trace), default=0.0)
    jobs = list(jobs)
    replicas = [
        Replica(machine, config, jobs, index, seconds=span, noise=noise, seed=seed, check=check) for index, config in enumerate(configs)
    ]
    serving = [r for r in replicas if r.serves]
    if trace and not serving:
        raise ValueError("no replica serves requests")
    router = Router(len(serving))
    due = [(0.0, i) for i in range(len(serving))]  # replicas that have something to run, by their clocks
    idle: set[int] = set()  # the others
    records = []
    for number, arrival in enumerate(trace):
        while due and due[0][0] < arrival.time:
            _, i = heapq.heappop(due)
            if serving[i].step():
                heapq.heappush(due, (serving[i].now, i))
            else:
                idle.add(i)
            router.load[i] = serving[i].load
        i = router.choose(arrival.adapter)
        records.append(serving[i].add(number, arrival))
        router.load[i] = serving[i].load
        if i in idle:
            idle.remove(i)
            heapq.heappush(due, (serving[i].now, i))
    for replica in replicas:
        finish(replica, span)
    return collect(replicas, records, span)
