"""How many replicas a load needs: serving and finetuning apart, against both on the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from flexllm.config import SchedulerConfig
from flexllm.core import FinetuneJob
from flexllm.simulate.cluster import fleet
from flexllm.simulate.replica import Machine
from flexllm.simulate.simulator import SimulationResult, simulate
from flexllm.simulate.workload import Arrival

DEDICATED_SECONDS = 60.0  # that the speed of finetuning alone is measured over


@dataclass(frozen=True)
class CapacityPlan:
    """Replica counts, and the runs that show them to be enough. Rates in tokens per second."""

    serving: int  # the fewest that attain the SLO with nothing else to do
    finetuning: int  # dedicated to it, for the wanted rate
    dedicated_rate: float  # of one of those
    coserving: int  # the fewest that do both
    inference: SimulationResult
    coserve: SimulationResult

    @property
    def separate(self) -> int:
        return self.serving + self.finetuning


def plan_capacity(
    trace: Sequence[Arrival],
    job: FinetuneJob,
    finetune_rate: float,
    config: SchedulerConfig,
    machine: Machine,
    machine_alone: Machine | None = None,
    *,
    attainment: float = 0.99,
    max_replicas: int = 64,
    seconds: float | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> CapacityPlan:
    """The fewest replicas for a trace with at least `attainment` of its requests within the SLO, and `finetune_rate` tokens per second.

    `machine_alone`: a replica that only serves, whose memory holds no activations (default: `machine`). Replicas that only
    finetune are as fast as one alone, and whole. ValueError when `max_replicas` are not enough.
    """

    def run(split: str, replicas: int) -> SimulationResult:
        on = machine_alone or machine if split == "inference" else machine
        return simulate(trace, [job], fleet(split, replicas, config), on, seconds=seconds, noise=noise, seed=seed)

    def serves(result: SimulationResult) -> bool:
        return result.attainment(config.slo, config.class_slos) >= attainment

    def does_both(result: SimulationResult) -> bool:
        return serves(result) and result.finetune_rate >= finetune_rate

    serving, inference = fewest(lambda n: run("inference", n), serves, max_replicas)
    alone = fleet("separate", 1, config, finetuning=1)
    dedicated_rate = simulate([], [job], alone, machine, seconds=DEDICATED_SECONDS).finetune_rate
    if finetune_rate > 0 and dedicated_rate == 0:
        raise ValueError(f"a replica takes no sequence through its backward in {DEDICATED_SECONDS:.0f} s")
    finetuning = ceil(finetune_rate / dedicated_rate) if finetune_rate > 0 else 0
    coserving, coserve = fewest(lambda n: run("coserve", n), does_both, max_replicas, start=serving)
    return CapacityPlan(serving, finetuning, dedicated_rate, coserving, inference, coserve)


def fewest(
    run: Callable[[int], SimulationResult], enough: Callable[[SimulationResult], bool], most: int, start: int = 1
) -> tuple[int, SimulationResult]:
    """The smallest n from `start` to `most` whose run is enough, if more never is less: doubling steps up, then bisection.

    ValueError if none is.
    """
    low, step, n = start - 1, 1, start
    while not enough(found := run(n)):
        if n >= most:
            raise ValueError(f"{n} replicas are not enough: the objectives cannot be met on this device, or the rate is too high")
        low, n, step = n, min(n + step, most), 2 * step
    while n - low > 1:
        middle = (low + n) // 2
        if enough(result := run(middle)):
            n, found = middle, result
        else:
            low = middle
    return n, found
