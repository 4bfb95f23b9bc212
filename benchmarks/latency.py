"""How well the latency model foretells iterations it has not seen, and how soon it follows a machine that changes.

An engine in this process (no HTTP) serves bursts of requests of random lengths while jobs train. Each iteration's predicted
time is compared with the measured one before the model learns from it. Four parts follow one another:

learn      a first mix of requests and one job; not counted
held_out   another seed, other lengths, bursts and jobs: the errors that are reported
contended  the same, while a process of our own keeps one core busy
alone      the same, once that process is gone

Beside the errors stand two bounds: the machine's own noise, taken in between, the errors of one who foretells a plan by how long
the very same took the last five times; and `hindsight`, the errors of the same model fitted to the very iterations that it is asked about.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from client import percentile
from common import finish, log, parser, spin_as_the_server
from flexllm.config import SLO, EngineConfig, FinetuneConfig, JobSpec, SchedulerConfig
from flexllm.core import InferenceChunk, PlanFeatures, Request, SamplingParams, StepPlan
from flexllm.engine import Engine
from flexllm.finetune.data import TokenizedDataset
from flexllm.model.loader import resolve_model
from flexllm.scheduler.latency import LatencyModel
from workloads import random_prompts

# By default an idle engine trains in slices of half a second: too few iterations a minute to say anything about.
SCHEDULER = SchedulerConfig(slo=SLO(ttft=5.0, tpot=0.5), idle_slice=0.1)
SECONDS = {"learn": 45.0, "held_out": 50.0, "contended": 25.0, "alone": 25.0}
QUICK_SECONDS = {"learn": 6.0, "held_out": 8.0, "contended": 5.0, "alone": 5.0}
REPORT_EVERY = 10.0  # seconds
PROBE_EVERY = 4  # iterations
# A change is followed when the median error of so many iterations is no more than this, or than the held-out part's median.
FOLLOWED, WINDOW = 0.10, 10
EXAMPLES = 64  # of each job


@dataclass(frozen=True)
class Mix:
    """Ranges from which requests and jobs are drawn."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    burst: tuple[int, int]  # requests that arrive together
    gap: tuple[int, int]  # iterations between bursts
    jobs: tuple[tuple[int, int, int], ...]  # shortest and longest example, examples per optimizer step


LEARN = Mix(prompt=(8, 384), output=(4, 48), burst=(0, 8), gap=(40, 40), jobs=((256, 256, 1),))
HELD_OUT = Mix(prompt=(16, 512), output=(8, 96), burst=(1, 6), gap=(10, 60), jobs=((48, 256, 2), (200, 512, 1)))


class Sample(NamedTuple):
    part: str
    features: PlanFeatures
    predicted: float  # seconds
    measured: float

    @property
    def kind(self) -> str:
        return kind_of(self.features)

    @property
    def error(self) -> float:
        return abs(self.measured / self.predicted - 1)


class Recorder:
    """Listens to a latency model: what it predicted for each iteration, and what came."""

    def __init__(self, latency: LatencyModel) -> None:
        self.samples: list[Sample] = []
        self.part = ""
        self._latency = latency
        self._observe = latency.observe
        latency.observe = self._record  # type: ignore[method-assign]

    def _record(self, features: PlanFeatures, seconds: float) -> None:
        if not features.is_empty:
            self.samples.append(Sample(self.part, features, self._latency.predict(features), seconds))
        self._observe(features, seconds)

    def of(self, part: str) -> list[Sample]:
        return [s for s in self.samples if s.part == part]


def kind_of(features: PlanFeatures) -> str:
    rows = features.rows - features.decode_rows
    parts = {
        "decode": features.decode_rows > 0,
        "prefill": rows > 0 and features.label_rows < rows,
        "window": features.windows > 0,
        "backward": features.backward_rows > 0,
        "step": features.optimizer_steps > 0,
    }
    return "+".join(name for name, present in parts.items() if present)


class Load:
    """Bursts of requests and some jobs; between the bursts the engine has nothing but the jobs to do."""

    def __init__(self, engine: Engine, probes: Probes, mix: Mix, seed: int, folder: Path) -> None:
        self._engine, self._probes, self._mix, self._rng = engine, probes, mix, random.Random(seed)
        self._name, self._count, self._next_burst = f"load{seed}", 0, 0
        self._jobs = [self._add_job(f"{self._name}-{i}", *job, folder) for i, job in enumerate(mix.jobs)]

    def run(self, seconds: float, part: str) -> None:
        began = reported = time.perf_counter()
        iterations = 0
        while (now := time.perf_counter()) < began + seconds:
            if self._next_burst == 0:
                self._next_burst = self._rng.randint(*self._mix.gap)
                self._burst()
            self._next_burst -= 1
            self._engine.step()
            iterations += 1
            if iterations % PROBE_EVERY == 0:
                self._probes.run(part)
            if now - reported >= REPORT_EVERY:
                reported = now
                log(f"{part}: {now - began:.0f} of {seconds:.0f} s, {iterations} iterations")

    def stop_jobs(self) -> None:
        for job in self._jobs:
            self._engine.cancel_job(job)

    def _burst(self) -> None:
        rng, mix, engine = self._rng, self._mix, self._engine
        lengths = [rng.randint(*mix.prompt) for _ in range(rng.randint(*mix.burst))]
        for prompt in random_prompts(lengths, engine.model_config.vocab_size, rng.getrandbits(32)):
            sampling = SamplingParams(max_tokens=rng.randint(*mix.output), temperature=0.0, ignore_eos=True)
            engine.add_request(Request(f"{self._name}-{self._count}", prompt, sampling, arrival=engine.clock()))
            self._count += 1

    def _add_job(self, name: str, shortest: int, longest: int, batch_size: int, folder: Path) -> str:
        lengths = [self._rng.randint(shortest, longest) for _ in range(EXAMPLES)]
        tokens = np.random.default_rng(self._rng.getrandbits(32)).integers(0, self._engine.model_config.vocab_size, sum(lengths) + 1)
        ids = tokens.astype(np.int32)
        path = folder / f"{name}.npz"
        TokenizedDataset(ids[:-1], ids[1:], np.cumsum([0, *lengths])).save(path)
        config = FinetuneConfig(num_epochs=1000, batch_size=batch_size, max_seq_length=longest, checkpoint_every=10**9)
        self._engine.add_job(JobSpec(name, str(path), str(folder / name), finetune=config))
        return name


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Probes:
    """Two plans, a decode batch and a prefill, that are repeated between the iterations, with pages of their own: what the machine's own
    restlessness makes of one and the same work at the time when the model is judged."""

    LENGTH, DECODES = 128, 8
    REMEMBERED = 5

    def __init__(self, engine: Engine) -> None:
        pages = -(-self.LENGTH // engine.config.cache.block_size)

        def request(i: int) -> Request:
            return Request(f"probe{i}", [1] * self.LENGTH, SamplingParams(temperature=0.0), 0.0, blocks=engine.blocks.allocate(pages))

        last, whole = (self.LENGTH - 1, self.LENGTH), (0, self.LENGTH)
        decodes = tuple(InferenceChunk(request(i), *last, True) for i in range(self.DECODES))
        plans = StepPlan(inference=decodes), StepPlan(inference=(InferenceChunk(request(self.DECODES), *whole, True),))
        self.deviations: list[tuple[str, float]] = []  # (part, error of the median of the last times as a prediction)
        self._engine = engine
        self._turns = itertools.cycle([(plan, deque[float](maxlen=self.REMEMBERED)) for plan in plans])

    def run(self, part: str) -> None:
        plan, before = next(self._turns)
        start = time.perf_counter()
        with torch.no_grad():
            self._engine.execute(plan)
        seconds = time.perf_counter() - start
        if before:
            self.deviations.append((part, abs(seconds / statistics.median(before) - 1)))
        before.append(seconds)

    def of(self, part: str) -> list[float]:
        return [deviation for p, deviation in self.deviations if p == part]


def iterations_to_follow(samples: list[Sample], bound: float) -> int | None:
    """Iterations from the change (the first of `samples`) to the end of the first WINDOW of them whose median error is no more than
    `bound`; WINDOW where the change did no harm, None if it was never followed."""
    errors = [s.error for s in samples]
    ends = range(WINDOW, len(errors) + 1)
    return next((end for end in ends if statistics.median(errors[end - WINDOW : end]) <= bound), None)


def measure(engine: Engine, seconds: dict[str, float], seed: int, folder: Path) -> tuple[Recorder, Probes]:
    recorder, probes = Recorder(engine.latency), Probes(engine)
    learn = Load(engine, probes, LEARN, seed, folder)
    recorder.part = "learn"
    learn.run(seconds["learn"], "learn")
    learn.stop_jobs()
    held_out = Load(engine, probes, HELD_OUT, seed + 1, folder)
    for part in ("held_out", "contended", "alone"):
        recorder.part = part
        with busy_core() if part == "contended" else contextlib.nullcontext():
            held_out.run(seconds[part], part)
    held_out.stop_jobs()
    return recorder, probes


def hindsight(samples: list[Sample]) -> list[float]:
    """Errors of a model that was fitted to these samples: what its terms can tell apart, with nothing to learn or to follow."""
    model = LatencyModel.default()
    model.fit([(s.features, s.measured) for s in samples])
    return [abs(s.measured / model.predict(s.features) - 1) for s in samples]


def spread(errors: list[float]) -> dict[str, float]:
    return {"p50": percentile(errors, 0.5), "p95": percentile(errors, 0.95)}


def report(recorder: Recorder, probes: Probes) -> dict[str, Any]:
    counted = recorder.of("held_out")
    bounds = {"noise": probes.of("held_out"), "noise_contended": probes.of("contended"), "hindsight": hindsight(counted)}
    fields: dict[str, Any] = {f"error_{k}": v for k, v in spread([s.error for s in counted]).items()}
    for name, errors in bounds.items():
        fields |= {f"{name}_{k}": v for k, v in spread(errors).items()}
    bound = max(FOLLOWED, fields["error_p50"])
    fields["drift_iterations"] = {part: iterations_to_follow(recorder.of(part), bound) for part in ("contended", "alone")}
    fields["by_part"] = {
        part: {"iterations": len(found), **spread([s.error for s in found])} for part in SECONDS if (found := recorder.of(part))
    }
    fields["by_kind"] = {}
    for kind in sorted({s.kind for s in counted}):
        errors = [s.error for s in counted if s.kind == kind]
        fields["by_kind"][kind] = figures = {"iterations": len(errors), **spread(errors)}
        log(f"{kind:30s} {len(errors):5d} iterations, error p50 {figures['p50']:.1%}, p95 {figures['p95']:.1%}")
    return fields


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=str(resolve_model(args.model)), device="cpu", threads=args.threads, scheduler=SCHEDULER, state_dir=Path(scratch)
        )
        engine = Engine(config, lambda what, share: log(f"{what}: {share:.0%}"))
        recorder, probes = measure(engine, QUICK_SECONDS if args.quick else SECONDS, args.seed, Path(scratch))
        engine.shutdown()
    fields = {**report(recorder, probes), "iterations": len(recorder.of("held_out"))}
    finish("latency", args, fields, {"part_kind_predicted_measured": [(s.part, s.kind, s.predicted, s.measured) for s in recorder.samples]})


if __name__ == "__main__":
    spin_as_the_server()
    main()
