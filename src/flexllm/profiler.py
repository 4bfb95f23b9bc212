"""The latency profile taken at first start: representative plans, executed and timed (a few seconds on a small model)."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexllm.compiler.remat import DeviceCosts
from flexllm.config import FinetuneConfig, JobSpec
from flexllm.core import (
    BackwardSlice,
    FinetuneJob,
    InferenceChunk,
    PlanFeatures,
    Request,
    SamplingParams,
    Sequence,
    SlicePart,
    StepPlan,
    TokenWindow,
)
from flexllm.finetune.data import TokenizedDataset
from flexllm.finetune.job import TrainingJob
from flexllm.model.decoder import Decoder
from flexllm.ops import synchronize
from flexllm.scheduler.latency import features_of

if TYPE_CHECKING:
    from flexllm.engine import Engine

COST_ROWS = 256  # of the GEMM that is timed

REPEATS = 3
BUDGET = 20.0  # seconds; a slow machine measures fewer sizes rather than starting late

Sample = tuple[PlanFeatures, float]


def take_profile(engine: Engine, progress: Callable[[str, float], None]) -> list[Sample]:
    """Time decode, prefill, window and backward plans at powers of two. Needs an idle engine; leaves no trace in it."""
    progress("preparing kernels", 0.0)
    for plans in (_decode_plans(engine, 1), _prefill_plans(engine, 8), _finetune_plans(engine, 8)):
        list(plans)  # what is compiled or packed at its first use is not the machine's speed
    samples: list[Sample] = []
    began = time.perf_counter()
    sizes = _powers(engine.config.scheduler.max_window_rows)
    for done, rows in enumerate(sizes):
        for plans in (_decode_plans(engine, rows), _prefill_plans(engine, rows), _finetune_plans(engine, rows)):
            samples += plans
        progress("measuring this machine", (done + 1) / len(sizes))
        if time.perf_counter() - began > BUDGET:
            break
    return samples


def measure_costs(model: Decoder) -> DeviceCosts:
    """What a base GEMM and a copy reach here: with these the compiler weighs running an operator again against keeping its result."""
    x = torch.zeros(COST_ROWS, model.config.hidden_size, dtype=model.dtype, device=model.device)
    w = model.layers[0].gate_up
    source, target = (torch.zeros(2**22, dtype=torch.float32, device=model.device) for _ in range(2))

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            synchronize(model.device)
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2.0 * COST_ROWS * w.shape[0] * w.shape[1]
    return DeviceCosts(flops / seconds(lambda: model.kernels.linear(x, w)), 2 * source.nbytes / seconds(lambda: target.copy_(source)))


def save_costs(costs: DeviceCosts, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(costs)), encoding="utf-8")


def load_costs(path: Path) -> DeviceCosts:
    """OSError or ValueError when there are none."""
    try:
        return DeviceCosts(**json.loads(path.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]


def _time(engine: Engine, plan: StepPlan) -> Sample:
    start = time.perf_counter()
    engine.execute(plan)
    return features_of(plan), time.perf_counter() - start


def _best(engine: Engine, plan: StepPlan) -> Sample:
    """The fastest of a few runs: what the machine can do; what it usually does is learned while running."""
    return min((_time(engine, plan) for _ in range(REPEATS)), key=lambda s: s[1])


def _request(engine: Engine, length: int, number: int) -> Request:
    block = engine.config.cache.block_size
    count = -(-length // block)
    first = number * count % max(1, engine.blocks.num_blocks - count)
    return Request(
        f"profile-{number}", [1] * length, SamplingParams(temperature=0.0), 0.0, blocks=list(range(first, first + count))
    )  # fmt: skip


def _decode_plans(engine: Engine, rows: int) -> Iterator[Sample]:
    for context in (64, 512):
        if rows <= engine.config.scheduler.max_running and context <= engine.max_model_len:
            chunks = tuple(InferenceChunk(_request(engine, context, i), context - 1, context, True) for i in range(rows))
            yield _best(engine, StepPlan(inference=chunks))


def _prefill_plans(engine: Engine, rows: int) -> Iterator[Sample]:
    if 1 < rows <= min(engine.max_model_len, engine.config.scheduler.max_batch_tokens):
        yield _best(engine, StepPlan(inference=(InferenceChunk(_request(engine, rows, 0), 0, rows, True),)))


def _finetune_plans(engine: Engine, rows: int) -> Iterator[Sample]:
    """A window over a whole fresh sequence, then its backward: a slice, a few slices, the rest."""
    if not 8 <= rows < engine.max_model_len:
        return
    with _training_job(engine, rows) as training:
        blocks = _request(engine, rows, 0).blocks
        job: FinetuneJob = training.job
        for _ in range(2):
            sequence = Sequence(-1, job, 0, rows, blocks=blocks)
            yield _time(engine, StepPlan(windows=(TokenWindow(sequence, 0, rows),)))
            layers = list(range(job.num_layers - 1, job.lowest_layer - 1, -1))
            for part in (layers[:1], layers[1:5], layers[5:]):
                if part:
                    slices = tuple(BackwardSlice(i, (SlicePart(sequence, 0, rows),)) for i in part)
                    yield _time(engine, StepPlan(backward=slices))
            job.group = [sequence]
            yield _time(engine, StepPlan(optimizer_steps=(job,)))
            engine.trainer.take_events()


class _training_job:
    """A job over one example of `rows` random tokens, known to the trainer (and not to the scheduler) for a while."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine, self.rows = engine, rows

    def __enter__(self) -> TrainingJob:
        engine = self.engine
        ids = np.random.default_rng(0).integers(0, engine.model_config.vocab_size, self.rows + 1)
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "train.npz"
        TokenizedDataset(ids[:-1].astype(np.int32), ids[1:].astype(np.int32), np.array([0, self.rows])).save(path)
        config = FinetuneConfig(num_epochs=1000, checkpoint_every=10**6, batch_size=1, save_level="recompute")
        spec = JobSpec("profile", str(path), self.folder.name, finetune=config)
        slot = engine.adapters.allocate_for_training(spec.peft)
        self.training = TrainingJob.open(spec, slot, engine.adapter_pool, engine.model, "profile")
        self.training.last_saved = float("inf")  # write nothing
        engine.trainer.add(self.training)
        return self.training

    def __exit__(self, *_: object) -> None:
        self.engine.trainer.remove("profile")
        self.folder.cleanup()
