"""The CUDA kernels against the reference ones, on a machine that has a CUDA device."""

from __future__ import annotations

import pytest
import torch

from flexllm.ops.cuda import CudaKernels
from flexllm.ops.reference import ReferenceKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("s", "b"), [(1, 1), (64, 64), (17, 200), (128, 129), (256, 1024)])
def test_window_attention(s: int, b: int) -> None:
    torch.manual_seed(0)
    heads, kv_heads, hd, scale = 8, 2, 64, 0.125
    q, do = (torch.randn(s, heads, hd, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(b, kv_heads, hd, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    want_o, want_lse = ReferenceKernels().window_attention(q.double(), k.double(), v.double(), scale)
    o, lse = CudaKernels().window_attention(q, k, v, scale)
    torch.testing.assert_close(o.double(), want_o, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=1e-3)
    wanted = ReferenceKernels().window_attention_backward(do.double(), q.double(), k.double(), v.double(), want_o, want_lse, scale)
    got = CudaKernels().window_attention_backward(do, q, k, v, o, lse, scale)
    for g, w in zip(got, wanted, strict=True):
        assert float((g.double() - w).norm() / w.norm()) < 2e-2


def test_decode_attention() -> None:
    torch.manual_seed(0)
    q = torch.randn(5, 8, 64, device="cuda", dtype=torch.bfloat16)
    cache = [torch.randn(400, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.randint(0, 400, (5, 70), device="cuda")
    lengths = torch.tensor([1, 70, 33, 2, 64], device="cuda")
    want = ReferenceKernels().decode_attention(q.double(), *(c.double() for c in cache), slots, lengths, 0.125)
    got = CudaKernels().decode_attention(q, *cache, slots, lengths, 0.125)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
