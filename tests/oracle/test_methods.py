"""Every PEFT method at every save level, cut at random: the gradients of Hugging Face PEFT and autograd."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexllm.core import StepPlan
from flexllm.peft.config import LoraConfig
from tests.oracle.harness import Bench, random_hf_model
from tests.oracle.methods import METHODS
from tests.oracle.test_gradients import compare, make_examples, run_to_end


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_level(method: str, tmp_path: Path) -> None:
    """Those with a name and, of the ladder between them, three; windows and slices of up to 9 rows."""
    hf = random_hf_model("llama", tmp_path / "model")
    examples = make_examples([23, 1, 31], seed=1)
    rng = random.Random(method)
    ladder = Bench(tmp_path / "model", torch.float64).add_job("job", examples, METHODS[method], "auto", tmp_path).job.levels
    between = [level.name for level in ladder if level.name.startswith("remat")]
    for level in ("keep", "recompute", *rng.sample(between, min(3, len(between))), "checkpoint", "segments", "kv"):
        bench = Bench(tmp_path / "model", torch.float64)
        training = bench.add_job("job", examples, METHODS[method], level, tmp_path)
        run_to_end(bench, bench.start(training), rng, longest=9)
        compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize("method", ["lora", "dora", "prefix", "prompt"])
@pytest.mark.parametrize("longest", [1, 1000])
def test_single_rows_and_whole_sequences(method: str, longest: int, tmp_path: Path) -> None:
    hf = random_hf_model("llama", tmp_path / "model")
    for level in ("recompute", "checkpoint", "segments", "kv"):
        bench = Bench(tmp_path / "model", torch.float64)
        examples = make_examples([14, 9], seed=2)
        training = bench.add_job("job", examples, METHODS[method], level, tmp_path)
        run_to_end(bench, bench.start(training), random.Random(0), longest)
        compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "bottleneck"])
def test_with_biases_and_head_norms(method: str, tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3"):
        hf = random_hf_model(family, tmp_path / family)
        bench = Bench(tmp_path / family, torch.float64)
        examples = make_examples([21, 8], seed=3)
        training = bench.add_job("job", examples, METHODS[method], "checkpoint", tmp_path)
        run_to_end(bench, bench.start(training), random.Random(5), longest=7)
        compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize("pair", [(a, b) for i, a in enumerate(METHODS) for b in list(METHODS)[i + 1 :: 4]])
def test_two_jobs_of_different_methods(pair: tuple[str, str], tmp_path: Path) -> None:
    """In the same iterations, each at some level of its own, with requests of a third adapter and of the base model."""
    rng = random.Random(" ".join(pair))
    hf = random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64, num_blocks=128)
    examples = [make_examples([26, 7], seed=5), make_examples([19, 12], seed=6)]
    other = bench.pool.allocate(LoraConfig(r=5))
    for p in bench.pool.parameters(other).values():
        p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    jobs = [bench.add_job(f"job-{i}", examples[i], METHODS[m], "auto", tmp_path) for i, m in enumerate(pair)]
    sequences = [s for j in jobs for s in bench.start(j, rng.randrange(len(j.levels)))]
    requests = [bench.request(i, 20, rng, slot) for i, slot in enumerate((other.id, -1))]
    run_to_end(bench, sequences, rng, 9, lambda: bench.prefill(requests, rng))
    for training, data in zip(jobs, examples, strict=True):
        compare(bench, hf, training, data, 1e-10)


def test_a_rebuilt_segment_writes_no_pages(tmp_path: Path) -> None:
    """Keys and values are the forward's; a slice that rebuilds rows leaves them as they are, bit for bit."""
    random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    training = bench.add_job("job", make_examples([20], seed=1), METHODS["lora"], "kv", tmp_path)
    (sequence,) = bench.start(training)
    from flexllm.core import BackwardSlice, SlicePart, TokenWindow

    bench.execute(StepPlan(windows=(TokenWindow(sequence, 0, 20),)))
    sequence.forward = 20
    before = [t.clone() for t in (*bench.cache.k, *bench.cache.v)]
    bench.execute(StepPlan(backward=(BackwardSlice(2, (SlicePart(sequence, 11, 20),)),)))
    assert all(torch.equal(a, b) for a, b in zip(before, (*bench.cache.k, *bench.cache.v), strict=True))
