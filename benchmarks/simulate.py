"""How far the simulator is from measurements: the requests of every cell of coserve.py's grid, once more on the virtual clock.

Iterations take what the engine's profile says, taken here and now, times two factors: one keeps the simulated engine busy for as long as
the measured one was with the requests alone, the other, on what only finetuning does, gives the speed of the job alone.
There is a pair for each trace, from all its loads, which were measured within ten minutes: between traces the machine's speed changes.
Co-serving, the two together, is then predicted, not fitted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import DTYPE, RESULTS, finish, log, parser, spin_as_the_server
from flexllm.config import SLO, CacheConfig, EngineConfig, SchedulerConfig
from flexllm.core import FinetuneJob, SaveLevel
from flexllm.llm import LLM
from flexllm.scheduler.latency import LatencyModel
from flexllm.simulate.replica import Machine
from flexllm.simulate.simulator import SimulationResult, simulate
from flexllm.simulate.workload import Arrival
from paper import timed
from workloads import training_texts

CONTESTANTS = {  # and the SLO each is told and judged by
    "inference-loose": "loose",
    "inference-strict": "strict",
    "coserve-loose": "loose",
    "coserve-strict": "strict",
}
COSERVING = "coserve-"
# Terms of the latency model that only finetuning has.
FINETUNING = ("label_rows", "windows", "backward_rows", "backward_pairs", "backward_slices", "optimizer_steps")
TEXTS, TEXT_WORDS = 200, 110  # of the job that coserve.py trains
NOISE = 0.1  # sigma of the log of an iteration's time: half of the errors are below 7 %, as latency.py's in quiet minutes
WARMUP = 2.0  # seconds that the job has run when requests begin to come
WIDEST, PRECISION = 16.0, 1.005  # of the fitted factors
FITTED = ("inference-loose", "inference-strict")
DEDICATED = 60.0  # seconds of the job alone
NUM_BLOCKS = 2048  # pages: memory is no limit there
DAY = 86400.0  # seconds
DAY_REPLICAS, DAY_RATE = 3, 1.9  # requests/s on each replica: the rate of the recorded trace


class Factors(NamedTuple):
    """Times the profile that iterations take: all of them, and on top of that what only finetuning does in them."""

    iteration: float
    finetuning: float = 1.0


@dataclass(frozen=True)
class Model:
    """The engine as profiled here: `profile` is what LatencyModel.save wrote."""

    profile: Mapping[str, Any]
    job: FinetuneJob
    noise: float = NOISE
    seed: int = 0

    def run(self, contestant: str, slo: SLO, trace: Sequence[Arrival], seconds: float, factors: Factors) -> SimulationResult:
        """A measured phase once more, iterations taking so many times their profile."""
        both, finetuning = factors
        coefficients = {k: both * (finetuning if k in FINETUNING else 1.0) * v for k, v in self.profile["coefficients"].items()}
        latency = LatencyModel(coefficients, [both * s for s in self.profile["slopes"]])
        machine = Machine(latency, NUM_BLOCKS, finetune_bytes=1 << 40)
        config = SchedulerConfig(slo=slo, mode=contestant.partition("-")[0])
        return simulate(trace, [self.job], config, machine, seconds=seconds, warmup=WARMUP, noise=self.noise, seed=self.seed)


def arrivals(requests: Iterable[Mapping[str, Any]]) -> list[Arrival]:
    """What was asked, with the outputs that were given (a failed request may have none: it counts as one token)."""
    found = (Arrival(r["due"], r["prompt_tokens"], max(1, r["output_tokens"])) for r in requests)
    return sorted(found, key=lambda arrival: arrival.time)


def figures(rounds: Sequence[SimulationResult], slo: SLO) -> dict[str, float]:
    """Of all rounds of a contestant, as coserve.py has them: requests pooled, finetuning the median."""
    records = [r for result in rounds for r in result.records]
    done = [r for r in records if r.finished]
    quantiles = {
        f"p{q}_{name}_ms": 1e3 * float(np.percentile([getattr(r, name) for r in done], q)) for name in ("ttft", "tpot") for q in (50, 99)
    }
    return {
        "attainment": statistics.fmean(r.attains(slo) for r in records),
        "finetune_tok_s": statistics.median(result.finetune_rate for result in rounds),
        **quantiles,
    }


class Cell:
    """A trace at a load: what was measured, and the same simulated."""

    def __init__(self, cell: Mapping[str, Any], measured: Mapping[str, Any], model: Model) -> None:
        self._cell, self._model = cell, model
        self._where = {name: cell[name] for name in ("trace", "load")}
        self._slos = {name: SLO(slo["ttft_s"], slo["tpot_s"]) for name, slo in measured["slos"].items()}
        here = [s for s in measured["samples"] if all(s[name] == value for name, value in self._where.items())]
        self._rounds = {name: [s for s in here if s["contestant"] == name and s["requests"]] for name in CONTESTANTS}

    @property
    def trace(self) -> str:
        return str(self._cell["trace"])

    @property
    def contestants(self) -> list[str]:
        """Those that answered requests."""
        return [name for name, rounds in self._rounds.items() if rounds]

    def simulate(self, contestant: str, factors: Factors) -> dict[str, float]:
        """Finetuning is counted over the time in which it was measured."""
        return figures(self._play(contestant, factors), self._slos[CONTESTANTS[contestant]])

    def _play(self, contestant: str, factors: Factors) -> list[SimulationResult]:
        slo = self._slos[CONTESTANTS[contestant]]
        return [self._model.run(contestant, slo, arrivals(s["requests"]), s["elapsed"], factors) for s in self._rounds[contestant]]

    def busy(self, factors: Factors) -> float:
        """Seconds that the simulated engine computes for the requests alone."""
        played = (result for name in FITTED for result in self._play(name, factors))
        return sum(result.seconds * (1 - result.shares["idle"]) for result in played)

    @property
    def measured_busy(self) -> float:
        return sum(s["busy_seconds"] for name in FITTED for s in self._rounds[name])

    @property
    def measured_alone(self) -> float | None:
        """Tokens per second of the job alone."""
        alone = self._cell["contestants"].get("finetune")
        return alone and alone["finetune_tok_s"]

    def compare(self, contestant: str, factors: Factors) -> dict[str, Any]:
        """One of the result's `workloads`."""
        simulated, slo = self.simulate(contestant, factors), CONTESTANTS[contestant]
        if not contestant.startswith(COSERVING):  # an iteration under way when its phase began is no finetuning of its own
            del simulated["finetune_tok_s"]
        known = self._cell["contestants"][contestant]
        measured = {name: known["attainment"][slo] if name == "attainment" else known[name] for name in simulated}
        log(
            f"{self._cell['trace']} {self._cell['load']} {contestant}, x {factors.iteration:.2f}, x {factors.finetuning:.2f}; "
            "simulated (measured): " + ", ".join(f"{name} {simulated[name]:.3g} ({measured[name]:.3g})" for name in simulated)
        )
        return {
            **self._where,
            "contestant": contestant,
            "slo": slo,
            "factors": factors._asdict(),
            "simulated": simulated,
            "measured": measured,
        }

    def dedicated(self, factors: Factors) -> float:
        """Tokens per second of the job alone."""
        return self._model.run("coserve-loose", self._slos["loose"], [], DEDICATED, factors).finetune_rate


def bisected(enough: Callable[[float], bool]) -> float:
    """The smallest factor that is enough, if all larger ones are: busy time and the speed of whole groups are far from linear."""
    low, high = 1 / WIDEST, WIDEST
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        if enough(middle):
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def fit(cells: Sequence[Cell]) -> Factors:
    """Of a trace's cells together: the first factor makes requests alone as busy as they were, the second the job alone as fast."""
    busy = sum(cell.measured_busy for cell in cells)
    iteration = bisected(lambda f: sum(cell.busy(Factors(f)) for cell in cells) >= busy)
    speeds = [speed for cell in cells if (speed := cell.measured_alone)]
    if not speeds:
        return Factors(iteration)
    fast = statistics.fmean(speeds)
    return Factors(iteration, bisected(lambda f: cells[0].dedicated(Factors(iteration, f)) <= fast))


def validate(measured: Mapping[str, Any], model: Model) -> list[dict[str, Any]]:
    """Simulated beside measured, for each contestant in each cell of a result of coserve.py."""
    cells = [cell for each in measured["cells"] if set(FITTED) <= set((cell := Cell(each, measured, model)).contestants)]
    found = []
    for _, together in itertools.groupby(cells, lambda cell: cell.trace):
        of_trace = list(together)
        factors = fit(of_trace)
        found += [cell.compare(contestant, factors) for cell in of_trace for contestant in cell.contestants]
    return found


def by_trace(workloads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Co-serving, the mean over a trace's loads and objectives."""
    found: dict[str, Any] = {}
    for trace in dict.fromkeys(w["trace"] for w in workloads):
        cells = [w for w in workloads if w["trace"] == trace and w["contestant"].startswith(COSERVING)]
        means = {
            figure: {side: statistics.fmean(w[side][figure] for w in cells) for side in ("simulated", "measured")}
            for figure in ("attainment", "finetune_tok_s")
        }
        tuned = means["finetune_tok_s"]
        found[trace] = {**means, "finetune_tok_s": {**tuned, "ratio": ratio(tuned["simulated"], tuned["measured"])}}
    return found


def ratio(simulated: float, measured: float) -> float | None:
    return simulated / measured if simulated and measured else None


def worst(ratios: Iterable[float | None]) -> float | None:
    """The one furthest from 1, either way; None of none."""
    return max((r for r in ratios if r is not None), key=lambda r: abs(math.log(r)), default=None)


def day(seconds: float, seed: int) -> dict[str, float]:
    """CPU time of a day of three co-serving replicas, extrapolated from its first `seconds` by the factor given."""
    found = timed(DAY_REPLICAS, DAY_RATE, seconds, seed)
    factor = DAY / seconds
    log(f"a day on {DAY_REPLICAS} replicas: {factor * found['cpu_s']:.0f} s of CPU time, {factor:g} times {found['cpu_s']:.1f} s")
    return {**found, "extrapolated_by": factor, "day_cpu_s": factor * found["cpu_s"]}


def engine(args: argparse.Namespace, state_dir: Path) -> EngineConfig:
    """As coserve.py's servers are set; in a state folder of its own, so that the profile is taken now."""
    return EngineConfig(model=args.model, dtype=DTYPE, threads=args.threads, state_dir=state_dir, cache=CacheConfig(num_blocks=NUM_BLOCKS))


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--measured", type=Path, default=RESULTS / "coserve.json", help="a result of coserve.py")
    options.add_argument("--profile", type=Path, metavar="FILE", help="a latency profile of the engine (default: taken now)")
    options.add_argument("--noise", type=float, default=NOISE, help="sigma of the log of an iteration's time")
    args = options.parse_args()
    measured = json.loads(args.measured.read_text())
    if "cells" not in measured:
        raise SystemExit(f"{args.measured} has no cells: it is not a result of this coserve.py")
    if args.quick:
        measured["cells"] = measured["cells"][:1]
    with tempfile.TemporaryDirectory() as folder, LLM(config=engine(args, Path(folder))) as llm:
        path = args.profile or Path(folder, "profile.json")
        if not args.profile:
            llm.latency.save(path)
        profile = json.loads(path.read_text())
        lengths = [len(llm.tokenizer.encode(text)) for text in training_texts(TEXTS, TEXT_WORDS, args.seed)]
        layers = llm.model_config.num_layers
    job = FinetuneJob("job", lengths, lengths, 1, epochs=1 << 20, num_layers=layers, levels=(SaveLevel("recompute", 1),))
    workloads = validate(measured, Model(profile, job, args.noise, args.seed))
    traces = by_trace(workloads)
    coserving = [w for w in workloads if w["contestant"].startswith(COSERVING)]
    cells = [ratio(*(w[side]["finetune_tok_s"] for side in ("simulated", "measured"))) for w in coserving]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # a fork would inherit torch's threads
        whole_day = pool.submit(day, 60.0 if args.quick else 1800.0, args.seed)
        thousand = pool.submit(timed, 100 if args.quick else 1000, DAY_RATE, 1.0, args.seed)
    fields = {
        "workloads": workloads,
        "by_trace": traces,
        "worst_ratio": worst(t["finetune_tok_s"]["ratio"] for t in traces.values()),
        "worst_cell_ratio": worst(cells),
        "day": whole_day.result(),
        "thousand_replicas": thousand.result(),
        "assumptions": {
            "noise": args.noise,
            "warmup_s": WARMUP,
            "fitted": "by trace, two factors over all loads: on the busy time without finetuning, and on finetuning without requests",
        },
        "measured_at": {"commit": measured["commit"], "date": measured["date"]},
    }
    finish("simulate", args, fields, [])


if __name__ == "__main__":
    spin_as_the_server()  # whose iterations the profile stands for
    main()
