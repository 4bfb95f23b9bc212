"""How long planning an iteration takes: `schedule()` with 256 running requests, 1000 waiting and 8 finetuning jobs.

No model: iterations are answered by a stand-in that lets the predicted time pass. Requests end and new ones come, so that
admission and page growth are at work. Finetuning gets nothing while requests wait, so its planning is measured in a second state,
where 256 run, none waits for long, and 8 jobs share the slack. The objective is a median under 0.2 ms and a p99 under 1 ms; what
is reported on top is the slower of the two states.
"""

from __future__ import annotations

import random
import statistics
import time

from client import percentile
from common import finish, log, parser
from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob, Request, SamplingParams, SaveLevel, StepPlan, StepResult, TokenLogprob
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget
from flexllm.scheduler.latency import LatencyModel
from flexllm.scheduler.scheduler import HybridTokenScheduler

RUNNING, WAITING, JOBS = 256, 1000, 8
PROMPTS = (16, 256)  # tokens, from and to
OUTPUTS = {"waiting": (64, 512), "finetuning": (640, 5120)}  # where none waits, requests come as often as they end: seldom enough
LAYERS = 32
WARMUP = 600  # iterations: until as many end as come
LEVELS = (SaveLevel("recompute", bytes_per_token=1 << 16),)


class Load:
    """Keeps RUNNING + `waiting` requests here, of random prompt and output lengths."""

    def __init__(self, scheduler: HybridTokenScheduler, waiting: int, outputs: tuple[int, int], seed: int) -> None:
        self._scheduler, self._total, self._outputs = scheduler, RUNNING + waiting, outputs
        self._rng = random.Random(seed)
        self._count = 0

    def refill(self, now: float) -> None:
        while self._scheduler.num_running + self._scheduler.num_waiting < self._total:
            prompt = [1] * self._rng.randint(*PROMPTS)
            sampling = SamplingParams(max_tokens=self._rng.randint(*self._outputs), ignore_eos=True)
            self._scheduler.add_request(Request(f"r{self._count}", prompt, sampling, arrival=now))
            self._count += 1


def build(seed: int) -> HybridTokenScheduler:
    config = SchedulerConfig(slo=SLO(ttft=3600.0, tpot=1.0), max_running=RUNNING, max_batch_tokens=1024)
    scheduler = HybridTokenScheduler(config, BlockPool(RUNNING * 512, 16), LatencyModel.default(), ByteBudget(1 << 40))
    rng = random.Random(seed)
    for number in range(JOBS):
        lengths = [rng.randint(64, 1024) for _ in range(100)]
        job = FinetuneJob(f"job{number}", lengths, lengths, group_size=4, epochs=1000, num_layers=LAYERS, levels=LEVELS)
        scheduler.add_job(job)
    return scheduler


def pretend(plan: StepPlan, now: float) -> StepResult:
    tokens = {c.request.id: TokenLogprob(7, 0.0) for c in plan.inference if c.sample}
    return StepResult(tokens, start=now, end=now + plan.predicted)


def measure(state: str, iterations: int, seed: int) -> tuple[dict[str, float], list[float]]:
    """Figures of one of OUTPUTS' states, and the milliseconds of every 20th iteration."""
    scheduler = build(seed)
    load = Load(scheduler, WAITING if state == "waiting" else 0, OUTPUTS[state], seed)
    now, plan_ms, update_ms, running, with_finetuning = 0.0, [], [], [], 0
    for iteration in range(-WARMUP, iterations):
        load.refill(now)
        start = time.perf_counter()
        plan = scheduler.schedule(now)
        planned = time.perf_counter()
        result = pretend(plan, now)
        answered = time.perf_counter()
        scheduler.update(plan, result)
        now = result.end
        if iteration >= 0:
            update_ms.append(1e3 * (time.perf_counter() - answered))
            plan_ms.append(1e3 * (planned - start))
            running.append(scheduler.num_running)
            with_finetuning += bool(plan.windows or plan.backward)
    scheduler.check_integrity()
    found = {
        "median_ms": percentile(plan_ms, 0.5),
        "p99_ms": percentile(plan_ms, 0.99),
        "max_ms": max(plan_ms),
        "update_median_ms": percentile(update_ms, 0.5),
        "update_p99_ms": percentile(update_ms, 0.99),
        "running": statistics.mean(running),
        "waiting": scheduler.num_waiting,
        "share_with_finetuning": with_finetuning / iterations,
    }
    log(f"{state}: median {found['median_ms']:.3f} ms, p99 {found['p99_ms']:.3f}, finetuning in {found['share_with_finetuning']:.0%}")
    return found, plan_ms[::20]


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    iterations = 2000 if args.quick else 10000
    found = {state: measure(state, iterations, args.seed) for state in OUTPUTS}
    worst = {name: max(figures[name] for figures, _ in found.values()) for name in ("median_ms", "p99_ms", "max_ms")}
    states = {state: figures for state, (figures, _) in found.items()}
    fields = {**worst, "states": states, "jobs": JOBS, "iterations": iterations}
    finish("schedule", args, fields, {"plan_ms_every_20th": {state: sample for state, (_, sample) in found.items()}})


if __name__ == "__main__":
    main()
