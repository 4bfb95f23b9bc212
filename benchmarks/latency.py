"""How well the latency model foretells iterations: its error on a mix of plans it has not seen, while it learns online.

An engine in this process serves bursts of requests of random lengths while a job trains. Each iteration's predicted time
is compared with the measured one before the model learns from it. Beside it stands the machine's own noise: the spread of
one and the same plan, which no model can foretell.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client import percentile
from common import finish, log, parser
from finetune import finetuning
from flexllm.config import SLO, EngineConfig, SchedulerConfig
from flexllm.core import InferenceChunk, Request, SamplingParams, StepPlan
from flexllm.engine import Engine
from flexllm.model.loader import resolve_model
from flexllm.scheduler.latency import LatencyModel, PlanFeatures
from workloads import random_prompts

WARMUP = 50  # iterations before errors count
NOISE_RUNS = 60
BURST_EVERY = 40  # iterations


class Recorder:
    """Listens to a latency model: what it predicted for each iteration, and what came."""

    def __init__(self, latency: LatencyModel) -> None:
        self.samples: list[tuple[str, float, float]] = []  # (kind, predicted, measured), seconds
        self._latency = latency
        self._observe = latency.observe
        latency.observe = self._record  # type: ignore[method-assign]

    def _record(self, features: PlanFeatures, seconds: float) -> None:
        self.samples.append((kind_of(features), self._latency.predict(features), seconds))
        self._observe(features, seconds)


def kind_of(features: PlanFeatures) -> str:
    parts = {
        "decode": features.decode_rows > 0,
        "prefill": features.prefill_pairs > 0 and features.rows > features.decode_rows,
        "window": features.label_rows > 0,
        "backward": features.backward_rows > 0,
    }
    return "+".join(name for name, present in parts.items() if present) or "other"


def drive(engine: Engine, iterations: int, seed: int) -> None:
    """Bursts of requests; in between the engine has nothing but the job to do."""
    rng = random.Random(seed)
    count = 0
    for iteration in range(iterations):
        if iteration % BURST_EVERY == 0:
            for prompt in random_prompts(
                (rng.randint(8, 384) for _ in range(rng.randint(0, 8))), engine.model_config.vocab_size, iteration
            ):
                sampling = SamplingParams(max_tokens=rng.randint(4, 48), temperature=0.0, ignore_eos=True)
                engine.add_request(Request(f"r{count}", prompt, sampling, arrival=engine.clock()))
                count += 1
        engine.step()


def noise(engine: Engine) -> list[float]:
    """Relative deviations of one decode plan's times from their median. Needs an engine that holds no request."""
    length = 64
    pages = -(-length // engine.config.cache.block_size)
    chunks = tuple(
        InferenceChunk(
            Request(f"noise{i}", [1] * length, SamplingParams(temperature=0.0), 0.0, blocks=list(range(i * pages, (i + 1) * pages))),
            length - 1,
            length,
            True,
        )
        for i in range(8)
    )
    seconds = []
    for _ in range(NOISE_RUNS):
        start = time.perf_counter()
        with torch.no_grad():
            engine.execute(StepPlan(inference=chunks))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return [abs(s / median - 1) for s in seconds]


def errors(samples: list[tuple[str, float, float]]) -> list[float]:
    return [abs(measured / predicted - 1) for _, predicted, measured in samples]


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    iterations = 400 if args.quick else 3000
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=str(resolve_model(args.model)),
            device="cpu",
            threads=args.threads,
            scheduler=SchedulerConfig(slo=SLO(ttft=5.0, tpot=0.1)),
            state_dir=Path(scratch),
        )
        engine = Engine(config)
        machine_noise = noise(engine)
        recorder = Recorder(engine.latency)
        examples = np.random.default_rng(args.seed).integers(0, engine.model_config.vocab_size, (64, 257))
        with finetuning(engine, examples, Path(scratch)):
            drive(engine, iterations, args.seed)
        engine.shutdown()
    counted = recorder.samples[WARMUP:]
    by_kind: dict[str, Any] = {}
    for kind in sorted({k for k, _, _ in counted}):
        found = errors([s for s in counted if s[0] == kind])
        by_kind[kind] = {"iterations": len(found), "p50": percentile(found, 0.5), "p95": percentile(found, 0.95)}
        log(f"{kind:30s} {len(found):5d} iterations, error p50 {by_kind[kind]['p50']:.1%}, p95 {by_kind[kind]['p95']:.1%}")
    fields = {
        "error_p50": percentile(errors(counted), 0.5),
        "error_p95": percentile(errors(counted), 0.95),
        "noise_p50": percentile(machine_noise, 0.5),
        "noise_p95": percentile(machine_noise, 0.95),
        "iterations": len(counted),
        "by_kind": by_kind,
    }
    finish("latency", args, fields, {"kind_predicted_measured": counted})


if __name__ == "__main__":
    main()
