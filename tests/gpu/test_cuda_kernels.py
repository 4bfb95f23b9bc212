"""The CUDA kernels against the float64 reference on the same (rounded) inputs, on a machine that has a CUDA device.

Errors are relative, in the Frobenius norm: a single rounding to bf16 is 1.7e-3.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexllm.ops import select_kernels
from flexllm.ops.reference import ReferenceKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REFERENCE = ReferenceKernels()
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5


def rand(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to("cuda", dtype)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


def check_same(kernel: str, dtype: torch.dtype, *args: object, bound: float | None = None) -> None:
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    cuda = select_kernels(torch.device("cuda"))
    ours, types, wanted = (
        r if isinstance(r, tuple) else (r,)
        for r in (getattr(cuda, kernel)(*args), getattr(REFERENCE, kernel)(*args), getattr(REFERENCE, kernel)(*exact))
    )
    for got, same, want in zip(ours, types, wanted, strict=True):
        assert (got.shape, got.dtype) == (same.shape, same.dtype)
        assert error(got, want) <= (bound or BOUND[dtype]), kernel
    for now, then in zip(args, before, strict=True):
        assert not isinstance(now, Tensor) or torch.equal(now, then), "an argument was written to"


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(0, 48), (1, 48), (130, 576), (5, 4096)])
def test_rowwise(dtype: torch.dtype, rows: int, columns: int) -> None:
    x, dy, weight = (
        rand(rows, 2 * columns, dtype=dtype)[:, :columns],
        rand(rows, columns, dtype=dtype, seed=1),
        rand(columns, dtype=dtype, seed=2),
    )
    check_same("rms_norm", dtype, x, weight, EPS)
    check_same("rms_norm_dx", dtype, dy, x, weight, EPS)
    check_same("head_rms_norm", dtype, x, weight[:12] if columns == 48 else weight[:64], EPS)
    check_same("head_rms_norm_dx", dtype, dy, x, weight[:12] if columns == 48 else weight[:64], EPS)
    g, u = rand(rows, 2 * columns, dtype=dtype, seed=3).split(columns, dim=-1)
    check_same("swiglu", dtype, g, u)
    check_same("swiglu_backward", dtype, dy, g, u)


@DTYPES
@pytest.mark.parametrize(("rows", "heads", "hd"), [(1, 1, 8), (5, 3, 16), (130, 9, 64), (64, 40, 128), (3, 5, 80)])
def test_rope(dtype: torch.dtype, rows: int, heads: int, hd: int) -> None:
    angles = rand(rows, hd // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = rand(rows, 2 * heads * hd, dtype=dtype)[:, : heads * hd]  # a column slice, as q is of qkv
    check_same("rope", dtype, x, cos, sin)
    check_same("rope_transpose", dtype, x, cos, sin)


@DTYPES
@pytest.mark.parametrize(("s", "b"), [(1, 1), (1, 70), (64, 64), (17, 200), (128, 129), (256, 1024), (300, 300)])
@pytest.mark.parametrize(("heads", "kv_heads", "hd"), [(9, 3, 64), (4, 4, 16), (32, 8, 128)])
def test_window_attention(dtype: torch.dtype, s: int, b: int, heads: int, kv_heads: int, hd: int) -> None:
    q, do = rand(s, 2 * heads, hd, dtype=dtype)[:, :heads], rand(s, heads, hd, dtype=dtype, seed=3)
    k, v = (rand(b, kv_heads, hd, dtype=dtype, seed=i) for i in (1, 2))
    scale = hd**-0.5
    check_same("window_attention", dtype, q, k, v, scale)
    o, lse = REFERENCE.window_attention(q.double(), k.double(), v.double(), scale)
    o, lse = o.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if b > 1:
        check_same("window_attention_backward", dtype, do, q, k, v, o, lse, scale, bound=3 * BOUND[dtype])
        return
    dq, dk, dv = select_kernels(torch.device("cuda")).window_attention_backward(do, q, k, v, o, lse, scale)
    assert max(dq.abs().max(), dk.abs().max()) <= 10 * BOUND[dtype]  # 0, up to the rounding of dO.v - dO.o
    assert error(dv, do.unflatten(1, (kv_heads, -1)).sum(2)) <= 2 * BOUND[dtype]


@DTYPES
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 300), (7, 33), (32, 200), (3, 5000)])
@pytest.mark.parametrize(("heads", "kv_heads", "hd"), [(9, 3, 64), (4, 4, 16), (8, 1, 48), (6, 2, 8), (32, 8, 128)])
def test_decode_attention(dtype: torch.dtype, batch: int, context: int, heads: int, kv_heads: int, hd: int) -> None:
    q = rand(batch, 2 * heads, hd, dtype=dtype)[:, :heads]
    k, v = rand(2, 400, kv_heads, hd, dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 400, (batch, context), generator=generator).cuda()
    lengths = torch.randint(1, context + 1, (batch,), generator=generator).cuda()
    check_same("decode_attention", dtype, q, k, v, slots, lengths, hd**-0.5)


@DTYPES
@pytest.mark.parametrize("backward", [True, False])
def test_cross_entropy_head(dtype: torch.dtype, backward: bool) -> None:
    cuda = select_kernels(torch.device("cuda"))
    h, weight = rand(300, 64, dtype=dtype), rand(1000, 64, dtype=dtype, seed=1)
    labels = (h.double() @ weight.double().t()).argmax(-1)
    labels[::2] = 7
    loss, correct, dh = cuda.cross_entropy_head(h, cuda.pack_linear(weight), labels, 0.25, backward)
    exact = REFERENCE.cross_entropy_head(h.double(), REFERENCE.pack_linear(weight.double()), labels, 0.25, backward)
    assert loss == pytest.approx(exact[0], rel=1e-3 if dtype in (torch.float16, torch.bfloat16) else 1e-6)
    assert abs(correct - exact[1]) <= 6
    if dh is None or exact[2] is None:
        assert dh is exact[2]
    else:
        assert dh.dtype == dtype
        assert error(dh, exact[2]) <= 2 * BOUND[dtype]
