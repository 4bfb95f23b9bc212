"""How long planning an iteration takes: `schedule()` with 256 running requests, 1000 waiting and 8 finetuning jobs.

No model: iterations are answered by a stand-in that lets the predicted time pass. Requests end and new ones come, so that
admission, page growth and finetuning are all at work. The objective is a median under 0.2 ms and a p99 under 1 ms.
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
PROMPTS, OUTPUTS = (16, 256), (64, 512)  # tokens, from and to
LAYERS = 32
LEVELS = (SaveLevel("recompute", bytes_per_token=1 << 16),)


class Load:
    """Keeps WAITING requests in the queue, of random prompt and output lengths."""

    def __init__(self, scheduler: HybridTokenScheduler, seed: int) -> None:
        self._scheduler = scheduler
        self._rng = random.Random(seed)
        self._count = 0

    def refill(self, now: float) -> None:
        while self._scheduler.num_waiting < WAITING:
            prompt = [1] * self._rng.randint(*PROMPTS)
            sampling = SamplingParams(max_tokens=self._rng.randint(*OUTPUTS), ignore_eos=True)
            self._scheduler.add_request(Request(f"r{self._count}", prompt, sampling, arrival=now))
            self._count += 1


def build(seed: int) -> HybridTokenScheduler:
    """A scheduler that has room for more requests than RUNNING: with a full batch it would leave finetuning out. Their number is
    where as many end as the rows of an iteration can prefill."""
    prompt, output = sum(PROMPTS) / 2, sum(OUTPUTS) / 2
    rows = round(RUNNING * (prompt + output) / output)
    config = SchedulerConfig(slo=SLO(ttft=3600.0, tpot=1.0), max_running=2 * RUNNING, max_batch_tokens=rows, idle_slice=0.5)
    blocks = RUNNING * 128
    scheduler = HybridTokenScheduler(config, BlockPool(blocks, 16), LatencyModel.default(), ByteBudget(1 << 40))
    rng = random.Random(seed)
    for number in range(JOBS):
        lengths = [rng.randint(64, 1024) for _ in range(100)]
        job = FinetuneJob(f"job{number}", lengths, lengths, group_size=4, epochs=1000, num_layers=LAYERS, levels=LEVELS)
        scheduler.add_job(job)
    return scheduler


def pretend(plan: StepPlan, now: float) -> StepResult:
    tokens = {c.request.id: TokenLogprob(7, 0.0) for c in plan.inference if c.sample}
    return StepResult(tokens, start=now, end=now + plan.predicted)


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    iterations = 2000 if args.quick else 20000
    scheduler = build(args.seed)
    load = Load(scheduler, args.seed)
    now = 0.0
    load.refill(now)
    while scheduler.num_running < RUNNING:
        plan = scheduler.schedule(now)
        result = pretend(plan, now)
        scheduler.update(plan, result)
        now = result.end
        load.refill(now)
    log(f"{scheduler.num_running} running, {scheduler.num_waiting} waiting, {len(scheduler.jobs)} jobs")
    plan_ms, update_ms, running, with_finetuning = [], [], [], 0
    for _ in range(iterations):
        start = time.perf_counter()
        plan = scheduler.schedule(now)
        planned = time.perf_counter()
        result = pretend(plan, now)
        answered = time.perf_counter()
        scheduler.update(plan, result)
        update_ms.append(1e3 * (time.perf_counter() - answered))
        plan_ms.append(1e3 * (planned - start))
        running.append(scheduler.num_running)
        with_finetuning += bool(plan.windows or plan.backward)
        now = result.end
        load.refill(now)
    scheduler.check_integrity()
    fields = {
        "median_ms": percentile(plan_ms, 0.5),
        "p99_ms": percentile(plan_ms, 0.99),
        "max_ms": max(plan_ms),
        "update_median_ms": percentile(update_ms, 0.5),
        "update_p99_ms": percentile(update_ms, 0.99),
        "iterations": iterations,
        "share_with_finetuning": with_finetuning / iterations,
        "running": statistics.mean(running),
        "waiting": WAITING,
        "jobs": JOBS,
    }
    finish("schedule", args, fields, {"plan_ms_every_20th": plan_ms[::20]})


if __name__ == "__main__":
    main()
