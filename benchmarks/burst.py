"""Case study: a burst of requests meets a server whose LoRA job always trains. How fast does training give way, and come back?

One co-serving server for ten minutes under a light Poisson load. In the middle, `--jump` requests come at once and then, for a
minute, `--times` as many as before. The server's own trace says what every iteration did (src/flexllm/tracing.py).
"""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from client import LoadGenerator, RequestRecord, percentile, raw, summarize
from common import DTYPE, finish, log, parser
from contestants import decode_step_seconds
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model
from flexllm.simulate.workload import Arrival, poisson_arrivals
from flexllm.tracing import read_events
from grid import REFERENCE_STEP, SLOS, slos_here
from jobs import start_job
from processes import flexllm_server
from workloads import random_prompts, shorter_here

SETTLE = 5.0  # seconds the job trains alone before the load and after the last answer
RATE_WINDOW = 1.0  # seconds over which a finetuning rate is taken
BACK_AT = 0.8  # of the median rate before the burst: training is back
SEARCH_STEP = 0.05  # seconds between the windows that are looked at
ZOOM = (-3.0, 9.0)  # seconds around the burst's beginning of which every iteration is kept in the result


@dataclass(frozen=True, slots=True)
class Iteration:
    """An iteration of the trace; seconds, `start` from the start of the load."""

    start: float
    actual: float
    predicted: float
    slack: float  # inf: no deadline
    decode: int  # rows, as the next two
    prefill: int
    window: int
    backward: int  # rows x layers
    running: int  # requests after it, as the next
    waiting: int
    finished: int = 0  # requests that ended in it

    @property
    def end(self) -> float:
        return self.start + self.actual

    @property
    def serves(self) -> bool:
        return self.decode + self.prefill > 0

    @property
    def finetunes(self) -> bool:
        return self.window + self.backward > 0

    @property
    def fits(self) -> bool:
        """No finetuning in it, or by prediction done before the earliest deadline."""
        return not self.finetunes or self.predicted <= self.slack + 1e-6  # both are rounded in the file


def read_trace(path: Path, start: float) -> list[Iteration]:
    """The iterations of a trace in order, with times counted from `start` on the engine's clock (time.monotonic)."""
    iterations: list[Iteration] = []
    taken = [f.name for f in fields(Iteration) if f.name not in ("start", "slack", "finished")]
    for event in read_events(path):
        args = event.get("args", {})
        if event["ph"] == "X":
            slack = math.inf if args["slack"] is None else args["slack"]
            iterations.append(Iteration(event["ts"] / 1e6 - start, slack=slack, **{name: args[name] for name in taken}))
        elif event["name"] == "finished" and iterations:
            iterations[-1] = replace(iterations[-1], finished=iterations[-1].finished + 1)
    return iterations


# --------------------------------------------------------------------------------------------------------- what it says
def arrivals_seen(iterations: Sequence[Iteration]) -> list[tuple[int, bool]]:
    """Indices of the iterations before which requests reached the engine, and whether it had none then."""
    found, before = [], 0
    for i, it in enumerate(iterations):
        after = it.running + it.waiting
        if after + it.finished > before:
            found.append((i, before == 0))
        before = after
    return found


def iterations_until(iterations: Sequence[Iteration], first: int, holds: Callable[[Iteration], bool]) -> int:
    """How many iterations from `first` on it takes until one `holds`: 1 if `first` does. Raises ValueError if none does."""
    for count, it in enumerate(iterations[first:], 1):
        if holds(it):
            return count
    raise ValueError(f"none of the {len(iterations) - first} iterations from number {first} on is as it should be")


def gives_way(iterations: Sequence[Iteration], burst_start: float) -> dict[str, Any]:
    """How training yields. `gives_way_iterations`: from the one that the burst's first request reached to one that computes
    requests, and finetunes within their deadlines; `newcomer_iterations_max`: from a request that finds the engine without
    any to one with its rows, the worst case of the run; the shares are of iterations with both requests and finetuning.
    """
    seen = arrivals_seen(iterations)
    burst = next(i for i, _ in seen if iterations[i].start >= burst_start)
    both = [it for it in iterations if it.serves and it.finetunes]
    newcomers = [iterations_until(iterations, i, lambda it: it.serves) for i, idle in seen if idle]
    return {
        "gives_way_iterations": iterations_until(iterations, burst, lambda it: it.serves and it.fits),
        "newcomer_iterations_max": max(newcomers, default=None),
        "newcomers_to_idle": len(newcomers),
        "planned_within_slack": sum(it.fits for it in both) / len(both) if both else None,
        "ended_within_slack": sum(it.actual <= it.slack for it in both) / len(both) if both else None,
        "shared_iterations": len(both),
    }


def spread(iterations: Sequence[Iteration], quantity: Callable[[Iteration], float], edges: Sequence[float]) -> list[float]:
    """Per second between neighbouring `edges`, each iteration's quantity spread evenly over its time."""
    totals = [0.0] * (len(edges) - 1)
    for it in iterations:
        amount = quantity(it)
        if not amount or it.end <= edges[0] or it.start >= edges[-1]:
            continue
        for i, (low, high) in enumerate(pairwise(edges)):
            overlap = min(high, it.end) - max(low, it.start)
            if overlap > 0:
                totals[i] += amount * overlap / it.actual
    return [total / (high - low) for total, (low, high) in zip(totals, pairwise(edges), strict=True)]


def finetune_rate(iterations: Sequence[Iteration], layers: int, edges: Sequence[float]) -> list[float]:
    """Finetuning tok/s between edges: half a token for its forward, half for its backward, since in any one second a job may
    do only one of them."""
    return spread(iterations, lambda it: (it.window + it.backward / layers) / 2, edges)


def comes_back(iterations: Sequence[Iteration], layers: int, usual: float, after: float) -> float | None:
    """Seconds from `after` to the first RATE_WINDOW in which the rate is BACK_AT of the `usual` one; None if there is none."""
    near = [it for it in iterations if it.end > after]
    for step in range(int((iterations[-1].end - RATE_WINDOW - after) / SEARCH_STEP) + 1):
        begin = after + step * SEARCH_STEP
        if finetune_rate(near, layers, (begin, begin + RATE_WINDOW))[0] >= BACK_AT * usual:
            return begin - after
    return None


def by_second(records: Sequence[RequestRecord], iterations: Sequence[Iteration], layers: int) -> dict[str, list[Any]]:
    """Columns, an entry per second from the start of the load to the end of the trace; `p99_gap_ms` is None where no token came."""
    n = math.ceil(iterations[-1].end)
    edges = [float(i) for i in range(n + 1)]
    gaps: list[list[float]] = [[] for _ in range(n)]
    arrivals, output = [0] * n, [0] * n
    for record in records:
        if record.due < n:
            arrivals[int(record.due)] += 1
        moment = record.first
        for gap in (None, *record.gaps):
            if moment is None:  # it failed before its first token
                break
            moment += gap or 0.0
            if moment < n:
                output[int(moment)] += 1
                if gap is not None:
                    gaps[int(moment)].append(gap)
    return {
        "second": edges[:-1],
        "arrivals": arrivals,
        "in_flight": [sum(r.due < t + 0.5 < (r.last or r.due) for r in records) for t in edges[:-1]],
        "output_tok_s": output,
        "finetune_forward_tok_s": spread(iterations, lambda it: it.window, edges),
        "finetune_backward_tok_s": spread(iterations, lambda it: it.backward / layers, edges),
        "p99_gap_ms": [1e3 * percentile(g, 0.99) if g else None for g in gaps],
    }


def figures(
    records: Sequence[RequestRecord],
    iterations: Sequence[Iteration],
    layers: int,
    slo: tuple[float, float],
    burst: tuple[float, float],
    seconds: float,
) -> dict[str, Any]:
    """What the run amounts to before, during and after the burst; requests belong to the part in which they were due."""
    spans = {"before": (0.0, burst[0]), "during": burst, "after": (burst[1], seconds)}
    wanted = ("requests", "failed", "attainment", "p99_tpot_ms", "p99_ttft_ms", "max_gap_ms", "output_tok_s")
    parts: dict[str, dict[str, Any]] = {}
    for name, (low, high) in spans.items():
        summary = summarize([r for r in records if low <= r.due < high], *slo)
        rate = finetune_rate(iterations, layers, (low, high))[0]
        parts[name] = {"seconds": high - low, "finetune_tok_s": rate, **{key: summary[key] for key in wanted}}
    usual = statistics.median(finetune_rate(iterations, layers, [float(t) for t in range(int(burst[0]) + 1)]))
    over = max((r.last for r in records if burst[0] <= r.due < burst[1] and r.last is not None), default=burst[1])
    return {
        **{key: {name: part[key] for name, part in parts.items()} for key in parts["before"]},
        **gives_way(iterations, burst[0]),
        "finetune_tok_s_usual": usual,
        "burst_over_at": over,
        "comes_back_seconds": comes_back(iterations, layers, usual, over),
    }


# ------------------------------------------------------------------------------------------------------------ the run
def burst_load(
    rate: float, times: float, jump: int, burst: tuple[float, float], seconds: float, lengths: tuple[int, int], seed: int
) -> list[Arrival]:
    """Poisson at `rate`, in the burst at `rate` x `times`, where `jump` requests at once open it."""
    low, high = burst

    def part(part_rate: float, begin: float, end: float, number: int) -> list[Arrival]:
        drawn = poisson_arrivals(part_rate, end - begin, *lengths, length_cv=0.5, seed=seed * 10 + number)
        return [replace(a, time=a.time + begin) for a in drawn]

    opening = [Arrival(low, *lengths)] * jump
    return [*part(rate, 0.0, low, 1), *opening, *part(rate * times, low, high, 2), *part(rate, high, seconds, 3)]


async def offer(base_url: str, model: str, arrivals: Sequence[Arrival], prompts: list[list[int]]) -> tuple[float, list[RequestRecord]]:
    """Also the time at which it began, on the clock that the engine's trace has."""
    async with LoadGenerator(base_url, model) as generator:
        return time.monotonic(), await generator.open_loop(arrivals, prompts)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rate", type=float, default=0.3, help="requests per second outside of the burst")
    options.add_argument("--times", type=float, default=8.0, help="the burst's rate is so many times that")
    options.add_argument("--jump", type=int, default=8, help="requests that come at once when the burst begins")
    options.add_argument("--prompt-tokens", type=int, default=128, help="shorter on slow machines, as the next")
    options.add_argument("--output-tokens", type=int, default=64)
    options.add_argument("--slo", choices=sorted(SLOS), default="loose")
    args = options.parse_args()
    seconds, length = (60.0, 12.0) if args.quick else (600.0, 60.0)
    burst = (seconds / 2, seconds / 2 + length)
    model = resolve_model(args.model)
    config = ModelConfig.from_hf(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = ["--state-dir", str(folder / "state"), "--dtype", DTYPE]
        with flexllm_server(model, folder / "probe.log", *flags, threads=args.threads) as server:
            h = decode_step_seconds(server, config.vocab_size, args.seed) / REFERENCE_STEP
        slo = slos_here(h)[args.slo]
        lengths = args.prompt_tokens // shorter_here(h), args.output_tokens // shorter_here(h)
        arrivals = burst_load(args.rate, args.times, args.jump, burst, seconds, lengths, args.seed)
        prompts = random_prompts([a.prompt_tokens for a in arrivals], config.vocab_size, args.seed)
        log(f"h = {h:.2f}; objectives: TTFT {slo[0]:.1f} s, TPOT {1e3 * slo[1]:.0f} ms; {len(arrivals)} requests in {seconds:.0f} s")
        flags += ["--slo-ttft", f"{slo[0]:.4f}", "--slo-tpot", f"{slo[1]:.4f}", "--trace", str(folder / "trace.json")]
        with flexllm_server(model, folder / "flexllm.log", *flags, threads=args.threads) as server:
            start_job(server, folder, args.seed)
            time.sleep(SETTLE)
            start, records = asyncio.run(offer(server.base_url, server.model, arrivals, prompts))
            time.sleep(SETTLE)
        iterations = read_trace(folder / "trace.json", start)
    found = figures(records, iterations, config.num_layers, slo, burst, seconds)
    for name in ("before", "during", "after"):
        log(f"{name}: attainment {found['attainment'][name]:.1%}, finetuning {found['finetune_tok_s'][name]:.0f} tok/s")
    log(f"gives way after {found['gives_way_iterations']} iterations, comes back in {found['comes_back_seconds']} s")
    found |= {
        "slo": {"name": args.slo, "ttft_s": slo[0], "tpot_s": slo[1], "h": h},
        "load": {"rate": args.rate, "times": args.times, "jump": args.jump, "burst": burst, "total_seconds": seconds, "lengths": lengths},
    }
    finish("burst", args, found, samples(records, iterations, config.num_layers, burst[0]))


def samples(records: Sequence[RequestRecord], iterations: Sequence[Iteration], layers: int, burst_start: float) -> dict[str, Any]:
    """The seconds of the run, the iterations around the burst's beginning (as columns; a slack that is none is None), the requests."""
    near = [asdict(it) for it in iterations if ZOOM[0] <= it.start - burst_start <= ZOOM[1]]
    columns = {f.name: [it[f.name] for it in near] for f in fields(Iteration)}
    columns["slack"] = [s if math.isfinite(s) else None for s in columns["slack"]]
    return {"by_second": by_second(records, iterations, layers), "iterations": columns, "requests": raw(records)}


if __name__ == "__main__":
    main()
