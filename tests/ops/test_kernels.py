"""The CPU kernels against the reference, and the reference's hand-written gradients against autograd.

Errors are relative, in the Frobenius norm. The yardstick is always the float64 reference on the same (rounded) inputs, so a bound for
bf16 speaks of the kernel's own rounding: a single rounding to bf16 is 1.7e-3.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flexllm.ops.cpu import CpuKernels
from flexllm.ops.reference import ReferenceKernels

CPU, REFERENCE = CpuKernels(), ReferenceKernels()
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def flat(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check_same(kernel: str, dtype: torch.dtype, *args: object, **bounds: float) -> None:
    """CPU kernel(args) equals the reference in float64, and has the reference's types and shapes."""
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    ours, theirs = (flat(getattr(k, kernel)(*args)) for k in (CPU, REFERENCE))
    for got, same, want in zip(ours, theirs, flat(getattr(REFERENCE, kernel)(*exact)), strict=True):
        assert (got.shape, got.dtype) == (same.shape, same.dtype)
        assert error(got, want) <= bounds.get("bound", BOUND[dtype])
    for now, then in zip(args, before, strict=True):
        assert not isinstance(now, Tensor) or torch.equal(now, then), "an argument was written to"


# ------------------------------------------------------------------------------------------------------------- linear
@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 33])
@pytest.mark.parametrize(("out", "size"), [(96, 64), (7, 5), (1, 130)])
def test_linear(dtype: torch.dtype, rows: int, out: int, size: int) -> None:
    weight, bias = rand(out, size, dtype=dtype), rand(out, dtype=dtype, seed=1)
    x, dy = rand(rows, 2 * size, dtype=dtype, seed=2)[:, :size], rand(rows, out, dtype=dtype, seed=3)
    for kernels in (CPU, CpuKernels(pack_backward=False)):
        w = kernels.pack_linear(weight)
        for _ in range(2):  # the second time with everything packed
            assert error(kernels.linear(x, w), x.double() @ weight.double().t()) <= BOUND[dtype]
            assert error(kernels.linear(x, w, bias), x.double() @ weight.double().t() + bias.double()) <= BOUND[dtype]
            assert error(kernels.linear_dx(dy, w), dy.double() @ weight.double()) <= BOUND[dtype]
        assert w.weight is weight
        assert w.shape == (out, size)


def test_transpose_is_packed_by_the_first_gradient() -> None:
    w = CPU.pack_linear(rand(8, 4, dtype=torch.float32))
    CPU.linear(rand(2, 4, dtype=torch.float32), w)
    assert w.packed.backward is None
    CPU.linear_dx(rand(2, 8, dtype=torch.float32), w)
    assert w.packed.backward is not None


@DTYPES
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_low_rank_products(dtype: torch.dtype, rows: int) -> None:
    x, u = rand(rows, 72, dtype=dtype), rand(rows, 16, dtype=dtype, seed=1)
    a, b = rand(16, 72, dtype=dtype, seed=2), rand(16, 40, dtype=dtype, seed=3)
    check_same("matmul_nt", dtype, x, a)
    check_same("matmul_nn", dtype, u, b)
    check_same("matmul_tn", dtype, u, x)
    check_same("add_matmul_nn", dtype, x, u, a)
    check_same("scale_columns", dtype, u, rand(rows, 16, dtype=dtype, seed=4))
    check_same("scale_columns", dtype, u, 0.5)


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 30, 64, 65])
@pytest.mark.parametrize(("rank", "out"), [(1, 40), (3, 1), (16, 200), (37, 64)])
def test_low_rank_products_into_column_slices(dtype: torch.dtype, rows: int, rank: int, out: int) -> None:
    whole, x = rand(rows, out + 9, dtype=dtype), rand(rows, 2 * rank, dtype=dtype, seed=1)[:, :rank]
    w, before = rand(rank, out, dtype=dtype, seed=2), whole.clone()
    CPU.add_matmul_nn_(whole[:, 4:-5], x, w)
    assert error(whole[:, 4:-5], before[:, 4:-5].double() + x.double() @ w.double()) <= BOUND[dtype]
    assert torch.equal(whole[:, :4], before[:, :4])
    assert torch.equal(whole[:, -5:], before[:, -5:])
    check_same("matmul_nt", dtype, before[:, 4:-5], w)


@pytest.mark.parametrize("halves", [(0, 1), (1, 0)])
def test_only_adjacent_halves_are_concatenated_without_a_copy(halves: tuple[int, int]) -> None:
    g, u, dm = (rand(6, 8, dtype=torch.bfloat16, seed=i) for i in range(3))
    parts = CPU.swiglu_backward(dm, g, u)
    joined = CPU.concat(*(parts[i] for i in halves))
    assert torch.equal(joined, torch.cat([parts[i] for i in halves], -1))
    assert (joined is parts[0]._base) == (halves == (0, 1))


# ------------------------------------------------------------------------------------------ normalisation, elementwise
@DTYPES
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_rms_norm(dtype: torch.dtype, rows: int) -> None:
    x, dy, weight = rand(rows, 48, dtype=dtype), rand(rows, 48, dtype=dtype, seed=1), rand(48, dtype=dtype, seed=2)
    check_same("rms_norm", dtype, x, weight, EPS)
    check_same("rms_norm_dx", dtype, dy, x, weight, EPS)
    check_same("head_rms_norm", dtype, x, weight[:12], EPS)
    check_same("head_rms_norm_dx", dtype, dy, x, weight[:12], EPS)


def test_rms_norm_rounds_where_llama_does() -> None:
    x, weight = rand(64, 576, dtype=torch.bfloat16), rand(576, dtype=torch.bfloat16, seed=1)
    same = CPU.rms_norm(x, weight, EPS) == REFERENCE.rms_norm(x, weight, EPS)
    assert same.double().mean() > 0.995


@DTYPES
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize(("heads", "hd"), [(1, 8), (3, 16)])
def test_rope(dtype: torch.dtype, rows: int, heads: int, hd: int) -> None:
    angles = rand(rows, hd // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = rand(rows, 2 * heads * hd, dtype=dtype)[:, : heads * hd]  # a column slice, as q is of qkv
    check_same("rope", dtype, x, cos, sin)
    check_same("rope_transpose", dtype, x, cos, sin)


@DTYPES
@pytest.mark.parametrize("rows", [1, 130])
def test_swiglu(dtype: torch.dtype, rows: int) -> None:
    g, u = rand(rows, 96, dtype=dtype).split(48, dim=-1)
    check_same("swiglu", dtype, g, u)
    check_same("swiglu_backward", dtype, rand(rows, 48, dtype=dtype, seed=1), g, u)


# ---------------------------------------------------------------------------------------------------------- attention
WINDOWS = [(1, 70), (5, 5), (64, 64), (24, 200), (130, 130), (129, 300), (300, 300), (16, 2500)]
HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 48), (2, 2, 128)]


@DTYPES
@pytest.mark.parametrize(("s", "b"), WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "hd"), HEADS)
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["flat", "peaked"])
def test_window_attention(dtype: torch.dtype, s: int, b: int, heads: int, kv_heads: int, hd: int, spread: float) -> None:
    q = rand(s, 2 * heads, hd, dtype=dtype)[:, :heads] * spread
    k, v = rand(b, kv_heads, hd, dtype=dtype, seed=1), rand(b, kv_heads, hd, dtype=dtype, seed=2)
    do, scale = rand(s, heads, hd, dtype=dtype, seed=3), hd**-0.5
    check_same("window_attention", dtype, q, k, v, scale)
    o, lse = REFERENCE.window_attention(q.double(), k.double(), v.double(), scale)
    o, lse = o.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check_same("window_attention_backward", dtype, do, q, k, v, o, lse, scale, bound=2 * BOUND[dtype])


@DTYPES
def test_a_row_that_sees_only_itself(dtype: torch.dtype) -> None:
    q, k, v, do = (rand(1, 2, 8, dtype=dtype, seed=i) for i in range(4))
    o, lse = CPU.window_attention(q, k, v, 0.5)
    assert torch.equal(o, v)
    assert error(lse, (q.double() * k.double()).sum(-1) * 0.5) <= 1e-6
    dq, dk, dv = CPU.window_attention_backward(do, q, k, v, o, lse, 0.5)
    assert max(dq.abs().max(), dk.abs().max()) <= 10 * BOUND[dtype]  # 0, up to the rounding of dO.v - dO.o
    assert error(dv, do) <= BOUND[dtype]


def test_window_backward_is_as_exact_as_flash_attention() -> None:
    """Torch's own bf16 kernel on the same rows, its dK and dV summed over the group in fp32."""
    s, heads, kv_heads, hd, scale = 256, 9, 3, 64, 0.125
    q, do = rand(s, heads, hd, dtype=torch.bfloat16), rand(s, heads, hd, dtype=torch.bfloat16, seed=1)
    k, v = rand(s, kv_heads, hd, dtype=torch.bfloat16, seed=2), rand(s, kv_heads, hd, dtype=torch.bfloat16, seed=3)
    exact = REFERENCE.window_attention(q.double(), k.double(), v.double(), scale)
    grads = REFERENCE.window_attention_backward(do.double(), q.double(), k.double(), v.double(), *exact, scale)

    full = [t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1)[None] for t in (q, k, v, do)]
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*full[:3], 0.0, True, scale=scale)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = (g[0].transpose(0, 1) for g in backward(full[3], *full[:3], o, lse, 0.0, True, scale=scale))
    flash = [dq, *(g.float().unflatten(1, (kv_heads, -1)).sum(2) for g in (dk, dv))]

    mine = CPU.window_attention_backward(do, q, k, v, *CPU.window_attention(q, k, v, scale), scale)
    for got, other, want in zip(mine, flash, grads, strict=True):
        assert error(got, want) <= 2 * error(other, want)


@DTYPES
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 300), (7, 33), (32, 200)])
@pytest.mark.parametrize(("heads", "kv_heads", "hd"), HEADS)
def test_decode_attention(dtype: torch.dtype, batch: int, context: int, heads: int, kv_heads: int, hd: int) -> None:
    q = rand(batch, 2 * heads, hd, dtype=dtype)[:, :heads]
    k, v = rand(2, 400, kv_heads, hd, dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 400, (batch, context), generator=generator)
    lengths = torch.randint(1, context + 1, (batch,), generator=generator)
    check_same("decode_attention", dtype, q, k, v, slots, lengths, hd**-0.5)


@DTYPES
def test_decode_attention_of_uneven_contexts(dtype: torch.dtype) -> None:
    """One long request among short ones: most slots are padding."""
    q, (k, v) = rand(9, 6, 16, dtype=dtype), rand(2, 500, 2, 16, dtype=dtype, seed=1)
    slots = torch.randint(0, 500, (9, 1500), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 70, 1, 1500, 40, 41, 5, 700, 2])
    check_same("decode_attention", dtype, q, k, v, slots, lengths, 0.25)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_rows_of_a_kernel() -> None:
    """The other tests have one thread (tests/conftest.py); more of them than cores is the harder case."""
    dtype = torch.bfloat16
    x, dy, weight = rand(300, 256, dtype=dtype), rand(300, 256, dtype=dtype, seed=1), rand(256, dtype=dtype, seed=2)
    check_same("rms_norm", dtype, x, weight, EPS)
    check_same("rms_norm_dx", dtype, dy, x, weight, EPS)
    check_same("swiglu_backward", dtype, dy, x, dy)
    q, do = rand(200, 6, 32, dtype=dtype), rand(200, 6, 32, dtype=dtype, seed=1)
    k, v = rand(300, 2, 32, dtype=dtype, seed=2), rand(300, 2, 32, dtype=dtype, seed=3)
    check_same("window_attention", dtype, q, k, v, 0.2)
    o, lse = REFERENCE.window_attention(q.double(), k.double(), v.double(), 0.2)
    check_same("window_attention_backward", dtype, do, q, k, v, o.to(dtype), lse.float(), 0.2, bound=2 * BOUND[dtype])
    slots, lengths = torch.randint(0, 300, (32, 250), generator=torch.Generator().manual_seed(0)), torch.arange(219, 251)
    check_same("decode_attention", dtype, rand(32, 6, 32, dtype=dtype), k, v, slots, lengths, 0.2)
    check_same("matmul_nt", dtype, x[:64], rand(16, 256, dtype=dtype, seed=4))


# --------------------------------------------------------------------------------------------------------------- loss
@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 11), (70, 500), (300, 1000), (20, 151_936)])
@pytest.mark.parametrize("backward", [True, False])
def test_cross_entropy_head(dtype: torch.dtype, rows: int, vocabulary: int, backward: bool) -> None:
    h, weight = rand(rows, 24, dtype=dtype), rand(vocabulary, 24, dtype=dtype, seed=1)
    labels = (h.double() @ weight.double().t()).argmax(-1)
    labels[::2] = torch.randint(0, vocabulary, labels[::2].shape, generator=torch.Generator().manual_seed(2))
    loss, correct, dh = CPU.cross_entropy_head(h, CPU.pack_linear(weight), labels, 0.25, backward)
    exact = REFERENCE.cross_entropy_head(h.double(), REFERENCE.pack_linear(weight.double()), labels, 0.25, backward)
    same_logits = REFERENCE.cross_entropy_head(h, REFERENCE.pack_linear(weight), labels, 0.25, backward=False)
    assert loss == pytest.approx(same_logits[0], rel=1e-4 if dtype == torch.bfloat16 else BOUND[dtype])
    if rows > 1 or dtype != torch.bfloat16:
        assert loss == pytest.approx(exact[0], rel=1e-3 if dtype == torch.bfloat16 else BOUND[dtype])
    assert abs(correct - exact[1]) <= (0.02 * rows if dtype == torch.bfloat16 else 0)  # logits are rounded: near ties
    if dh is None or exact[2] is None:
        assert dh is exact[2]
    else:
        assert dh.dtype == dtype
        assert error(dh, exact[2]) <= 2 * BOUND[dtype]


def test_cross_entropy_keeps_small_losses() -> None:
    """A probability near 1 has no room in bf16 for what is left of 1."""
    weight = torch.eye(8, dtype=torch.bfloat16)
    h = 9 * weight[:4]
    loss, correct, _ = CPU.cross_entropy_head(h, CPU.pack_linear(weight), torch.arange(4), 1.0)
    assert loss == pytest.approx(4 * math.log1p(7 * math.exp(-9)), rel=1e-3)
    assert correct == 4


# ----------------------------------------------------------------------------------- reference gradients vs. autograd
def autograd(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def test_reference_gradients() -> None:
    x, dy, weight = rand(6, 24), rand(6, 24, seed=1), rand(24, seed=2)
    (dx,) = autograd(lambda x: REFERENCE.rms_norm(x, weight, EPS), dy, x)
    assert error(REFERENCE.rms_norm_dx(dy, x, weight, EPS), dx) < 1e-13
    (dx,) = autograd(lambda x: REFERENCE.head_rms_norm(x, weight[:8], EPS), dy, x)
    assert error(REFERENCE.head_rms_norm_dx(dy, x, weight[:8], EPS), dx) < 1e-13

    angles = rand(6, 4).repeat(1, 2)
    (dx,) = autograd(lambda x: REFERENCE.rope(x, angles.cos(), angles.sin()), dy, x)
    assert error(REFERENCE.rope_transpose(dy, angles.cos(), angles.sin()), dx) < 1e-13

    u = rand(6, 24, seed=3)
    for got, want in zip(REFERENCE.swiglu_backward(dy, x, u), autograd(REFERENCE.swiglu, dy, x, u), strict=True):
        assert error(got, want) < 1e-13

    w = REFERENCE.pack_linear(rand(10, 24, seed=4))
    (dx,) = autograd(lambda x: REFERENCE.linear(x, w), rand(6, 10, seed=5), x)
    assert error(REFERENCE.linear_dx(rand(6, 10, seed=5), w), dx) < 1e-13


@pytest.mark.parametrize(("s", "b"), [(1, 2), (7, 7), (5, 19)])
def test_reference_attention_gradients(s: int, b: int) -> None:
    q, k, v, do = rand(s, 6, 8), rand(b, 2, 8, seed=1), rand(b, 2, 8, seed=2), rand(s, 6, 8, seed=3)
    exact = autograd(lambda *qkv: REFERENCE.window_attention(*qkv, 0.3)[0], do, q, k, v)
    o, lse = REFERENCE.window_attention(q, k, v, 0.3)
    for got, want in zip(REFERENCE.window_attention_backward(do, q, k, v, o, lse, 0.3), exact, strict=True):
        assert error(got, want) < 1e-12


def test_reference_cross_entropy() -> None:
    h, weight, labels = rand(70, 12), rand(30, 12, seed=1), torch.arange(70) % 30
    leaf = h.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf @ weight.t(), labels, reduction="sum")
    (dh,) = torch.autograd.grad(loss * 0.5, leaf)
    got_loss, correct, got = REFERENCE.cross_entropy_head(h, REFERENCE.pack_linear(weight), labels, 0.5)
    assert got_loss == pytest.approx(loss.item(), rel=1e-12)
    assert correct == int(((h @ weight.t()).argmax(-1) == labels).sum())
    assert got is not None
    assert error(got, dh) < 1e-12


# -------------------------------------------------------------------------------------------------------------- process
def test_generated_code_is_kept_for_many_numbers_of_rows() -> None:
    """oneDNN by itself forgets the first of 1000 GEMMs."""
    script = """
import torch
from flexllm.ops.cpu import CpuKernels
kernels = CpuKernels()
weight = kernels.pack_linear(torch.zeros(32, 32))
for rows in range(1, 1001):
    kernels.linear(torch.zeros(rows, 32), weight)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
    kernels.linear(torch.zeros(1, 32), weight)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "create:cache_hit" in said
    assert "cache_miss" not in said
