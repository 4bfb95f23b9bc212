"""The experiment of the FlexLLM paper (arXiv 2402.18789), simulated: three models, each on four pipelines of A100-80GB, 4 to 20 requests/s.

The scheduler is the real one, the seconds of an iteration come from a roofline with fixed efficiencies that nothing was fitted to,
so that the contestants can be compared with each other, and with the paper only as far as ASSUMPTIONS go.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from statistics import fmean
from typing import Any

from common import TRACES, finish, log, parser
from conventional import SHAPES
from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob
from flexllm.model.config import ModelConfig
from flexllm.simulate.cluster import fleet
from flexllm.simulate.replica import Machine
from flexllm.simulate.roofline import (
    BANDWIDTH_EFFICIENCY,
    COMPUTE_EFFICIENCY,
    DEVICES,
    example_job,
    layer_parameters,
    machine_of,
    roofline,
)
from flexllm.simulate.simulator import SimulationResult, simulate
from flexllm.simulate.workload import Arrival, gamma_arrivals, load_trace, scaled, scaled_lengths

DEVICE = "a100-80gb"
PIPELINES = 4
RATES = [4, 8, 12, 16, 20]  # requests per second, all pipelines together
MODELS = {  # devices of a pipeline, and the objective for TPOT in seconds; that for TTFT is the same for all
    "llama-3.1-8b": (1, 0.045),
    "qwen2.5-14b": (2, 0.075),
    "qwen2.5-32b": (4, 0.075),
}
TTFT = 5.0
ATTAINED = 0.9  # of the requests: the paper's bar
SEQUENCES = (1024, 8192)  # tokens of a training sequence, uniform between them
NOISE = 0.05  # sigma of the log of an iteration's time
WARMUP = 10.0  # seconds of finetuning before the first request
TRACE = TRACES / "azure2023_conv_min00-30.csv"
MEAN_PROMPT, MEAN_OUTPUT, GAP_CV, LENGTH_CV = 1243, 217, 2.0, 1.0  # of the made-up arrivals: about those of that trace
SEPARATE = {"separate-25": 1, "separate-50": 2, "separate-75": 3}  # pipelines that finetune
TEMPORAL = {"temporal-64": 64, "temporal-128": 128, "temporal-512": 512, "temporal-dynamic": 0}
CONTESTANTS = ["coserve", *SEPARATE, *TEMPORAL, "inference"]
SHORT_REQUESTS, SLOW_GEMMS = "requests of a quarter of the length", "half of the compute efficiency"
VARIANTS = [SHORT_REQUESTS, SLOW_GEMMS]  # of the first model, co-serving: what two of the assumptions are worth
LONGEST = 1 << 15  # no cut: tokens
FIGURES = ["finetune_tok_s", "attainment", "mean_tpot_ms", "p99_tpot_ms"]

# What the paper reports, one pipeline at 1 and at 5 requests/s: finetuning tokens/s, mean TPOT in ms.
PAPER = {
    "llama-3.1-8b": ((2352, 1799), (32.6, 36.7)),
    "qwen2.5-14b": ((941, 555), (57.9, 66.5)),
    "qwen2.5-32b": ((803, 559), (53.8, 59.8)),
}
PAPER_CLAIMS = {"kept": 0.76, "speedup_heavy": [1.9, 4.8], "speedup_light": [2.5, 6.8]}
ASSUMPTIONS = [
    f"kernels reach {COMPUTE_EFFICIENCY} of the device's FLOP/s and {BANDWIDTH_EFFICIENCY} of its bandwidth, forward and backward alike",
    "GEMMs are linear in the rows beyond the ridge, and a small training window is as efficient per row as a large one",
    "requests are the Azure 2023 conversation trace (or made-up ones of its mean lengths), stretched; the paper's may be shorter",
    f"training sequences have {SEQUENCES[0]} to {SEQUENCES[1]} tokens, every token a label; 4 to an optimizer step",
    "LoRA r16 on down_proj: the adapter's own FLOPs (0.1 %) and the optimizer's memory are left out; backward goes through all layers",
    "a turn of temporal sharing lasts as long as one full window, as in this engine",
    "no server, tokenizer or network; pages and activations share what the weights leave of 0.9 of the memory",
]


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """The first `rate` x `seconds` requests of the recorded trace over `seconds`; made-up ones where there is no trace."""
    if TRACE.exists():
        return scaled(load_trace(TRACE)[: round(rate * seconds)], rate)
    return gamma_arrivals(rate, seconds, MEAN_PROMPT, MEAN_OUTPUT, cv=GAP_CV, length_cv=LENGTH_CV, seed=seed)


class Experiment:
    """One model on its pipelines."""

    def __init__(self, name: str, seconds: float, seed: int, variant: str = "") -> None:
        """`variant`: one of VARIANTS, in which one assumption is another."""
        devices, tpot = MODELS[name]
        self.length_factor = 0.25 if variant == SHORT_REQUESTS else 1.0
        shape = ModelConfig.from_hf(SHAPES[name])
        rng = random.Random(seed)
        self.job = example_job(shape, [rng.randint(*SEQUENCES) for _ in range(256)])
        self.config = SchedulerConfig(slo=SLO(TTFT, tpot), max_running=256)
        self.both = machine_of(DEVICES[DEVICE], shape, devices, self.config.max_sequences * SEQUENCES[1])
        self.serving = machine_of(DEVICES[DEVICE], shape, devices)
        if variant == SLOW_GEMMS:
            self.both = replace(self.both, latency=roofline(DEVICES[DEVICE], shape, devices, compute_efficiency=COMPUTE_EFFICIENCY / 2))
        self.seconds, self.seed = seconds, seed

    def run(self, contestant: str, rate: float) -> dict[str, float]:
        """Figures of a contestant. Pipelines of their own that finetune are in `dedicated`, not here."""
        trace = scaled_lengths(arrivals(rate, self.seconds, self.seed), self.length_factor, LONGEST, LONGEST)
        config = self.config
        if contestant == "coserve":
            return self._figures(self._simulate(trace, fleet("coserve", PIPELINES, config), self.both))
        if contestant in TEMPORAL:
            slices = replace(config, temporal_inference_steps=TEMPORAL[contestant])
            return self._figures(self._simulate(trace, fleet("temporal", PIPELINES, slices), self.both))
        serving = PIPELINES - SEPARATE.get(contestant, 0)
        return self._figures(self._simulate(trace, fleet("inference", serving, config), self.serving))

    def dedicated(self) -> float:
        """Finetuning tokens per second of a pipeline that does nothing else."""
        return self._simulate([], fleet("separate", 1, self.config, finetuning=1), self.both).finetune_rate

    def _simulate(self, trace: Sequence[Arrival], configs: Sequence[SchedulerConfig], machine: Machine) -> SimulationResult:
        jobs: list[FinetuneJob] = [self.job]
        return simulate(trace, jobs, configs, machine, seconds=self.seconds, warmup=WARMUP, noise=NOISE, seed=self.seed)

    def _figures(self, result: SimulationResult) -> dict[str, float]:
        s = result.summary(self.config.slo)
        tpots = [r.tpot for r in result.records if r.finished and r.tokens > 1]
        return dict(zip(FIGURES, (s["finetune_rate"], s["attainment"], 1e3 * fmean(tpots), 1e3 * s["tpot_p99"]), strict=True))


def share_of_peak(name: str, finetune_tok_s: float) -> float:
    """Of the data sheet's FLOP/s of all pipelines, what finetuning alone amounts to (linears and head, forward and backward)."""
    shape = ModelConfig.from_hf(SHAPES[name])
    flops = 4 * (shape.num_layers * layer_parameters(shape) + shape.vocab_size * shape.hidden_size)
    return finetune_tok_s * flops / (PIPELINES * MODELS[name][0] * DEVICES[DEVICE].flops)


def measure(name: str, contestant: str, rate: float, seconds: float, seed: int, variant: str = "") -> dict[str, float]:
    """One simulation, in a process of its own: with rate 0 the dedicated pipeline."""
    experiment = Experiment(name, seconds, seed, variant)
    return experiment.run(contestant, rate) if rate else {"finetune_tok_s": experiment.dedicated()}


def table(name: str, found: dict[str, dict[float, dict[str, float]]], dedicated: float, rates: Sequence[float]) -> dict[str, Any]:
    """What a model's runs come to; `found`: contestant -> rate -> figures, `dedicated`: finetuning tokens/s of one pipeline."""
    rows: dict[str, Any] = {"rates": list(rates)}
    for contestant, at in found.items():
        rows[contestant] = {figure: [at[rate][figure] for rate in rates] for figure in FIGURES}
        if contestant in SEPARATE:
            rows[contestant]["finetune_tok_s"] = [SEPARATE[contestant] * dedicated] * len(rates)
    rows["dedicated"] = {"finetune_tok_s": PIPELINES * dedicated}
    coserve = rows["coserve"]["finetune_tok_s"]
    rows["kept"] = coserve[-1] / coserve[0]
    rows["share_of_peak"] = [share_of_peak(name, rate) for rate in coserve]
    rows["speedup_vs_separate"] = [speedup(rows, i) for i in range(len(rates))]
    return rows


def speedup(rows: dict[str, Any], i: int) -> float | None:
    """Finetuning of co-serving over that of the separate split that finetunes most and attains the SLO; None if none does."""
    splits = [rows[name]["finetune_tok_s"][i] for name in SEPARATE if rows[name]["attainment"][i] >= ATTAINED]
    return rows["coserve"]["finetune_tok_s"][i] / max(splits) if splits else None


def paper_figures() -> dict[str, Any]:
    """The paper's, for four pipelines."""
    return {
        name: {
            "rates": [RATES[0], RATES[-1]],
            "finetune_tok_s": [PIPELINES * rate for rate in rates],
            "mean_tpot_ms": list(tpots),
            "kept": rates[1] / rates[0],
            "share_of_peak": [share_of_peak(name, PIPELINES * rate) for rate in rates],
        }
        for name, (rates, tpots) in PAPER.items()
    }


# ------------------------------------------------------------------------------------------------------------- the scale
def timed(replicas: int, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """CPU time of co-serving an 8B model on so many replicas, `rate` requests/s on each. The replicas go on after `seconds` until
    every request is answered: that is in the iterations and in the time, not in the replica seconds."""
    experiment = Experiment("llama-3.1-8b", seconds, seed)
    trace = repeated(arrivals(rate * replicas, min(seconds, 1800.0), seed), seconds)
    begun = time.process_time()
    result = simulate(trace, [experiment.job], fleet("coserve", replicas, experiment.config), experiment.both, seconds=seconds)
    spent = time.process_time() - begun
    return {
        "replicas": replicas,
        "simulated_s": seconds,
        "requests": len(trace),
        "iterations": result.iterations,
        "cpu_s": spent,
        "us_per_iteration": 1e6 * spent / result.iterations,
        "replica_seconds_per_cpu_second": replicas * seconds / spent,
    }


def repeated(trace: list[Arrival], seconds: float) -> list[Arrival]:
    """A trace over and over, until there are `seconds` of it."""
    period = trace[-1].time + 1e-3
    times = int(seconds / period) + 1
    return [late for i in range(times) for a in trace if (late := replace(a, time=a.time + i * period)).time < seconds]


# ------------------------------------------------------------------------------------------------------------- the run
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, help="of the trace (default: 45, or 10 with --quick)")
    options.add_argument("--processes", type=int, default=1, help="simulations at a time")
    args = options.parse_args()
    seconds, rates = args.seconds or (10.0 if args.quick else 45.0), [RATES[0], RATES[-1]] if args.quick else RATES
    tasks = [(name, contestant, rate) for name in MODELS for contestant in CONTESTANTS for rate in rates]
    tasks += [(name, "dedicated", 0) for name in MODELS]
    first, ends = next(iter(MODELS)), (rates[0], rates[-1])
    begun = time.perf_counter()
    with ProcessPoolExecutor(args.processes) as pool:
        runs = {task: pool.submit(measure, *task, seconds, args.seed) for task in tasks}
        varied = {v: [pool.submit(measure, first, "coserve", rate, seconds, args.seed, v) for rate in ends] for v in VARIANTS}
        models = {}
        for name in MODELS:
            found = {c: {rate: runs[name, c, rate].result() for rate in rates} for c in CONTESTANTS}
            models[name] = table(name, found, runs[name, "dedicated", 0].result()["finetune_tok_s"], rates)
            show(name, models[name])
        variants = {}
        for variant, pair in varied.items():
            light, heavy = (run.result()["finetune_tok_s"] for run in pair)
            variants[variant] = {"finetune_tok_s": [light, heavy], "kept": heavy / light}
    fields = {
        "models": models,
        "paper": paper_figures(),
        "paper_claims": PAPER_CLAIMS,
        "assumptions": ASSUMPTIONS,
        "variants": {"model": first, "rates": list(ends), **variants},
        "workload": {"seconds": seconds, "recorded": TRACE.name if TRACE.exists() else None, "pipelines": PIPELINES, "device": DEVICE},
        "wall_s": time.perf_counter() - begun,
    }
    finish("paper", args, fields, [])


def show(name: str, rows: dict[str, Any]) -> None:
    speedups = ", ".join("-" if s is None else f"{s:.2f}" for s in rows["speedup_vs_separate"])
    log(f"{name}: dedicated {rows['dedicated']['finetune_tok_s']:,.0f} tok/s, kept {rows['kept']:.0%}, speedup {speedups}")
    for contestant in CONTESTANTS:
        at = rows[contestant]
        log(f"  {contestant:17}" + "".join(f"{t:9,.0f} {a:4.0%}" for t, a in zip(at["finetune_tok_s"], at["attainment"], strict=True)))


if __name__ == "__main__":
    main()
