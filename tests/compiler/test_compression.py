"""What is kept smaller than it was computed: a ReLU's signs as bits, dropout's mask as a seed, attention's probabilities as their LSE."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Proxy

from flexllm.compiler.levels import JobCompiler
from flexllm.compiler.remat import ITEMSIZE, DeviceCosts, Rematerialization, saved_tensor
from flexllm.core import StepPlan, TokenWindow
from flexllm.memory.activations import ActivationStore
from flexllm.model.config import ModelConfig
from flexllm.model.layer import tag
from flexllm.ops.operators import add, attend, dropout, linear, matmul_nn, matmul_nt, relu
from flexllm.ops.reference import dropout_factors
from flexllm.peft.base import Binding, method_of
from flexllm.peft.config import LINEARS, BottleneckConfig, LoraConfig
from flexllm.peft.pool import dropout_seeds
from tests.compiler.graphs import HEAD_DIM, KERNELS, Builder, Layer, assert_same
from tests.oracle.harness import Bench, oracle_gradients, peft_twin, random_hf_model
from tests.oracle.test_gradients import compare, make_examples, run_to_end


def bypass(b: Builder, x: Proxy, y: Proxy, width: int) -> Proxy:
    """LoRA's, whose parameters lie below whatever reads the result."""
    u = tag("u", matmul_nt(x, b.parameter(2, b.x.node.meta["columns"])))
    return tag("adapted", add(y, matmul_nn(u, b.parameter(2, width))))


# ---------------------------------------------------------------------------------------------------------------- ReLU
def relu_layer(columns: int) -> Layer:
    """adapter -> linear -> relu -> linear: no gradient but the ReLU's own wants the ReLU's output, for the weights are frozen."""
    b = Builder(columns=6, rows=9)
    hidden = linear(bypass(b, b.x, linear(b.x, b.weight(6, 6), None), 6), b.weight(columns, 6), None)
    r = tag("r", relu(tag("hidden", hidden)))
    return b.layer(linear(r, b.weight(4, columns), None))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_relu_is_kept_as_bits(columns: int) -> None:
    layer = relu_layer(columns)
    pruned = layer.pruned()
    _, want = layer.autograd(pruned.joint.forward_nodes)
    remat = Rematerialization(pruned, DeviceCosts(), context=10)
    keep = remat.keep()
    assert [n.meta["names"][0] for n in keep.saved] == ["x", "u", "r.bits"]
    _, context = layer.run(pruned, keep)
    assert context.saved["r.bits"].dtype == torch.uint8
    assert context.saved["r.bits"].shape == (9, -(-columns // 8))
    for choice in (keep, *remat.frontier(), remat.named(["x", "r"]), remat.named(["x", "hidden"])):  # from which bits can be made
        assert_same(layer.gradients(pruned, choice), want, 1e-12)


def test_a_bit_is_a_sixteenth_of_bf16() -> None:
    pruned = relu_layer(64).pruned()
    names = {name: saved_tensor(n) for n in pruned.forward for name in n.meta.get("names", ())}
    assert names["r"].bytes_per_token(ITEMSIZE) == 128
    assert names["r.bits"].bytes_per_token(ITEMSIZE) == names["r.bits"].bytes_per_token(8) == 8
    store = ActivationStore(100, torch.bfloat16, torch.device("cpu"))
    store.allocate(0, (names["r.bits"],))
    assert store.bytes == 800
    bits = torch.randint(0, 256, (3, 8), dtype=torch.uint8)
    store.write(0, "r.bits", 5, bits)
    assert torch.equal(store.read(0, 5, 8)["r.bits"], bits)


@pytest.mark.parametrize("level", ["keep", "recompute"])
def test_adapters_in_one_batch_have_bits_of_their_own(level: str, tmp_path: Path) -> None:
    """Their columns lie side by side in the fused forward, at no multiple of 8, and one has ReLUs where the other has none."""
    hf = random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    configs = [BottleneckConfig(bottleneck=5, target_modules=("mlp",)), BottleneckConfig(bottleneck=11)]
    examples = [make_examples([17], seed=1), make_examples([14, 6], seed=2)]
    jobs = [bench.add_job(f"job{i}", examples[i], config, level, tmp_path) for i, config in enumerate(configs)]
    for training in jobs:
        assert any(t.name.endswith(".bits") and t.pooled for layer in training.program(0).layers for t in layer.saved)
    run_to_end(bench, [s for training in jobs for s in bench.start(training)], random.Random(1), longest=7)
    for training, data in zip(jobs, examples, strict=True):
        compare(bench, hf, training, data, 1e-10)


# ------------------------------------------------------------------------------------------------------------- dropout
RATES = torch.tensor([0.0, 0.5, 0.1, 0.0, 0.9])


def test_dropout_keeps_nothing() -> None:
    """The mask follows from the rows' seeds, in the forward, in what is rebuilt and in the gradient."""
    b = Builder(columns=40)
    seeds = dropout_seeds(123, 0, 5)
    dropped = dropout(b.x, b.table((seeds, RATES)), b.table(2), 7)
    layer = b.layer(matmul_nn(tag("u", matmul_nt(dropped, b.parameter(3, 40))), b.parameter(3, 10)))
    pruned = layer.pruned()
    keep = Rematerialization(pruned, DeviceCosts(), context=10).keep()
    assert [n.meta["names"][0] for n in keep.saved] == ["x", "u"]
    x, down, up = (t.clone().requires_grad_() for t in (layer.x, layer.p["p0"], layer.p["p1"]))
    y = (x * dropout_factors(seeds, RATES, 40, 2, 7).double()) @ down.t() @ up
    y.backward(layer.dy)
    assert_same({"y": layer.run(pruned, keep)[0]}, {"y": y.detach()})
    assert_same(layer.gradients(pruned, keep), {"x": x.grad, "p0": down.grad, "p1": up.grad})
    assert not x.grad[4].all(), "of 40 elements, 9 in 10 are dropped"


def test_rows_and_rates() -> None:
    """Rows of rate 0 pass bit for bit; of the others a part of their rate is dropped, and the mean stays."""
    x = torch.randn(5, 40_000)
    y = KERNELS.dropout(x, (dropout_seeds(5, 0, 5), RATES), 1, 0)
    for row, rate in enumerate(RATES.tolist()):
        kept = y[row] != 0
        torch.testing.assert_close(y[row][kept], x[row][kept] / (1 - rate))
        assert abs(float(kept.double().mean()) - (1 - rate)) <= 4 * (rate * (1 - rate) / 40_000) ** 0.5
    assert torch.equal(y[[0, 3]], x[[0, 3]])


def test_masks_are_independent_and_reproducible() -> None:
    """Of rows, layers, places and seeds; but a row's is the same with whomever it is computed."""
    rates = torch.full((3,), 0.5)

    def mask(seed: int = 1, layer: int = 0, salt: int = 0, start: int = 0, rows: int = 3) -> Tensor:
        return dropout_factors(dropout_seeds(seed, start, rows), rates[:rows], 10_000, layer, salt) > 0

    others = [mask()[0], mask()[1], mask()[2], mask(layer=1)[0], mask(salt=1)[0], mask(seed=2)[0]]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert abs(float((a == b).double().mean()) - 0.5) <= 4 * 0.5 / 100, "half of the elements agree by chance"
    assert torch.equal(mask()[1:], mask(start=1, rows=2))


class _Masked(torch.nn.Module):
    """In the place of PEFT's own dropout."""

    def __init__(self, seed: int, rate: float, layer: int, salt: int) -> None:
        super().__init__()
        self.key = (seed, rate, layer, salt)

    def forward(self, x: Tensor) -> Tensor:
        seed, rate, layer, salt = self.key
        rows, columns = x.shape[-2:]
        return x * dropout_factors(dropout_seeds(seed, 0, rows), torch.full((rows,), rate), columns, layer, salt).to(x.dtype)


@pytest.mark.parametrize("level", ["keep", "recompute", "checkpoint", "segments", "kv"])
def test_lora_with_dropout(level: str, tmp_path: Path) -> None:
    """Windows and slices cut the sequence differently; all see PEFT's network with one mask."""
    hf = random_hf_model("llama", tmp_path / "model")
    bench, lora = Bench(tmp_path / "model", torch.float64), LoraConfig(r=3, lora_dropout=0.3)
    examples = make_examples([21], seed=1)
    training = bench.add_job("job", examples, lora, level, tmp_path)
    (sequence,) = bench.start(training)
    seed = training.dropout_seed(sequence)
    assert seed is not None
    run_to_end(bench, [sequence], random.Random(1), longest=8)

    twin = peft_twin(copy.deepcopy(hf), bench, training)
    for name, module in twin.named_modules():
        if hasattr(module, "lora_dropout"):
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1])
            module.lora_dropout["default"] = _Masked(seed, 0.3, layer, LINEARS.index(parts[-1]))
    _, want = oracle_gradients(twin, training, examples)
    training.ledger.label_count = 1
    assert_same(training.ledger.mean(), want)


@pytest.fixture
def model(tiny_llama: Path) -> ModelConfig:
    return ModelConfig.from_hf(tiny_llama)


def job_compiler(model: ModelConfig, lora: LoraConfig, context: int = 512) -> JobCompiler:
    method = method_of(lora)
    binding = Binding(method.kind(lora), method, method.features(lora), method.rank(lora))
    return JobCompiler(model, binding, range(model.num_layers), KERNELS, DeviceCosts(), context)


def test_dropout_costs_no_memory(model: ModelConfig) -> None:
    with_it, without = (job_compiler(model, LoraConfig(r=4, lora_dropout=rate)) for rate in (0.5, 0.0))
    for name in ("keep", "checkpoint"):
        assert [p.level.bytes_per_token for p in with_it.levels(name)] == [p.level.bytes_per_token for p in without.levels(name)]


# ----------------------------------------------------------------------------------------------------------- attention
def test_attention_keeps_the_lse() -> None:
    """One number per head, in fp32; the gradient is that of softmax all the same."""
    b = Builder(columns=2 * HEAD_DIM, rows=11)
    q = tag("q", bypass(b, b.x, linear(b.x, b.weight(2 * HEAD_DIM, 2 * HEAD_DIM), None), 2 * HEAD_DIM))
    k, v = (linear(b.x, b.weight(HEAD_DIM, 2 * HEAD_DIM), None) for _ in range(2))
    q.node.meta.update(head_dim=HEAD_DIM, kv_columns=HEAD_DIM)
    o, lse = attend(q, k, v)
    layer = b.layer(tag("o", o))
    tag("lse", lse)
    pruned = layer.pruned()
    keep = Rematerialization(pruned, DeviceCosts(), context=1000).keep()
    assert {n.meta["names"][-1]: saved_tensor(n).bytes_per_token(ITEMSIZE) for n in keep.saved} == {
        "x": 4 * HEAD_DIM,
        "u": 4,
        "q": 4 * HEAD_DIM,
        "o": 4 * HEAD_DIM,
        "lse": 2 * 4,
    }
    assert_same(layer.gradients(pruned, keep), layer.autograd(pruned.joint.forward_nodes)[1])


def test_what_a_sequence_keeps_grows_with_its_length_alone(model: ModelConfig, tmp_path: Path) -> None:
    """Twice the tokens, twice the bytes: nothing is kept per pair of tokens."""
    assert len({p.level.bytes_per_token for n in (16, 4096) for p in job_compiler(model, LoraConfig(r=4), n).levels("keep")}) == 1
    random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    training = bench.add_job("job", make_examples([20, 40], seed=1), LoraConfig(r=3), "keep", tmp_path)
    sequences = bench.start(training)
    bench.execute(StepPlan(windows=tuple(TokenWindow(s, 0, s.length) for s in sequences)))
    per_token = sum(layer.bytes_per_token(8) for layer in training.program(0).layers)
    assert [bench.trainer.states[s].store.bytes for s in sequences] == [20 * per_token, 40 * per_token]
