"""Token-level finetuning gives the gradients of sequence-level autograd, however it is cut and whoever shares the iterations."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flexllm.core import InferenceChunk, StepPlan
from flexllm.peft.config import LINEARS, LoraConfig
from tests.oracle.harness import VOCAB, Bench, oracle_gradients, peft_twin, random_hf_model, random_slices, random_windows

Examples = list[tuple[np.ndarray, np.ndarray]]


def make_examples(lengths: list[int], seed: int) -> Examples:
    """Random tokens; about a third of the labels ignored, never the last."""
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        ids = rng.integers(0, VOCAB, n)
        labels = rng.integers(0, VOCAB, n)
        labels[:-1][rng.random(n - 1) < 0.33] = -100
        out.append((ids.astype(np.int32), labels.astype(np.int32)))
    return out


def compare(bench: Bench, hf: torch.nn.Module, training, examples: Examples, tolerance: float) -> None:
    loss, wanted = oracle_gradients(peft_twin(copy.deepcopy(hf), bench, training), training, examples)
    got = training.ledger
    got.label_count = 1
    gradients = got.mean()
    assert gradients.keys() == wanted.keys()
    ours = sum(bench.trainer._sums[s].loss for s in training.job.group)
    assert ours == pytest.approx(loss, rel=max(tolerance, 1e-12))
    for name, want in wanted.items():
        error = float((gradients[name] - want).abs().max() / want.abs().max())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def run_to_end(bench: Bench, sequences: list, rng: random.Random, longest: int, company=lambda: ()) -> None:
    while not all(s.done for s in sequences):
        slices = random_slices(sequences, rng, longest)  # of sequences whose forward ended in an earlier iteration
        bench.execute(StepPlan(inference=company(), windows=random_windows(sequences, rng, longest), backward=slices))
    for s in sequences:
        assert bench.trainer.states[s].store.bytes == 0, "every saved tensor is freed when its layer is done"
        assert not bench.trainer.states[s].kv_grad


@pytest.mark.parametrize("family", ["llama", "llama3.1", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("level", ["keep", "recompute"])
def test_random_cuts_every_family(family: str, level: str, tmp_path: Path) -> None:
    hf = random_hf_model(family, tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    examples = make_examples([23, 1, 17, 40], seed=1)
    training = bench.add_job("job", examples, LoraConfig(r=5, lora_alpha=7), level, tmp_path)
    run_to_end(bench, bench.start(training), random.Random(3), longest=9)
    compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize("longest", [1, 1000])
def test_windows_of_one_token_and_whole_sequences(longest: int, tmp_path: Path) -> None:
    hf = random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    examples = make_examples([19, 8], seed=2)
    training = bench.add_job("job", examples, LoraConfig(r=4), "recompute", tmp_path)
    run_to_end(bench, bench.start(training), random.Random(0), longest)
    compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize("targets", [[t] for t in LINEARS] + [["q_proj", "v_proj"], ["k_proj", "down_proj"]])
@pytest.mark.parametrize("level", ["keep", "recompute"])
def test_any_subset_of_targets(targets: list[str], level: str, tmp_path: Path) -> None:
    hf = random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    examples = make_examples([21], seed=4)
    training = bench.add_job("job", examples, LoraConfig(r=3, target_modules=tuple(targets)), level, tmp_path)
    run_to_end(bench, bench.start(training), random.Random(1), longest=8)
    compare(bench, hf, training, examples, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("reference_ops", [False, True])
def test_mixed_company(dtype: torch.dtype, tolerance: float, reference_ops: bool, tmp_path: Path) -> None:
    """Two jobs with different ranks and targets, three inference adapters and the base model, all in the same iterations."""
    rng = random.Random(7)
    hf = random_hf_model("llama", tmp_path / "model", dtype)
    bench = Bench(tmp_path / "model", dtype, reference_ops, num_blocks=128)
    before = [t.clone() for t in (bench.model.embed, bench.model.layers[0].qkv.weight, bench.model.layers[2].down.weight)]
    first, second = make_examples([31, 12, 22], seed=5), make_examples([27, 9], seed=6)
    slots = []
    for i, rank in enumerate((2, 8, 5)):
        slots.append(bench.pool.allocate(LoraConfig(r=rank, target_modules=LINEARS[i : i + 4])))
        for p in bench.pool.parameters(slots[-1]).values():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    jobs = [
        bench.add_job("one", first, LoraConfig(r=4, lora_alpha=9), "recompute", tmp_path),
        bench.add_job("second", second, LoraConfig(r=7, target_modules=("k_proj", "o_proj", "up_proj"), use_rslora=True), "keep", tmp_path),
    ]
    others = {n: p.clone() for slot in slots for n, p in bench.pool.parameters(slot).items()}
    requests = [bench.request(i, rng.randint(3, 30), rng, slot) for i, slot in enumerate([-1, *(s.id for s in slots), -1])]

    def company() -> tuple[InferenceChunk, ...]:
        """Decode rows first, then prefill chunks, of a random part of the requests."""
        decode, prefill = [], []
        for r in requests:
            if rng.random() < 0.3:
                continue
            if r.num_computed < len(r.prompt_ids) - 1:
                end = min(len(r.prompt_ids) - 1, r.num_computed + rng.randint(1, 8))
                prefill.append(InferenceChunk(r, r.num_computed, end, False))
                r.num_computed = end
            elif r.num_computed > 0 and r.num_tokens < len(r.prompt_ids) + 30:
                decode.append(InferenceChunk(r, r.num_computed, r.num_computed + 1, True))
                r.num_computed += 1
                r.output_ids.append(rng.randrange(VOCAB))
        return (*decode, *prefill)

    run_to_end(bench, [s for j in jobs for s in bench.start(j)], rng, 9, company)
    compare(bench, hf, jobs[0], first, tolerance)
    compare(bench, hf, jobs[1], second, tolerance)
    after = (bench.model.embed, bench.model.layers[0].qkv.weight, bench.model.layers[2].down.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "base weights moved"
    now = {n: p for slot in slots for n, p in bench.pool.parameters(slot).items()}
    assert all(torch.equal(others[n], p) for n, p in now.items()), "another adapter moved"


def test_wrong_order_is_wrong(tmp_path: Path) -> None:
    """The order matters, and the engine refuses the wrong one: a layer has to start at its last row."""
    from flexllm.core import BackwardSlice, SlicePart, TokenWindow

    random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    training = bench.add_job("job", make_examples([12], seed=1), LoraConfig(r=2), "recompute", tmp_path)
    (sequence,) = bench.start(training)
    bench.execute(StepPlan(windows=(TokenWindow(sequence, 0, 12),)))
    sequence.forward = 12
    with pytest.raises(AssertionError, match="last row"):
        bench.execute(StepPlan(backward=(BackwardSlice(2, (SlicePart(sequence, 0, 5),)),)))
