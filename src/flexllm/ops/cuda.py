"""CUDA kernels: torch's flash attention, and Triton's (gpu/) for what torch does in many passes. Each is tested equal to reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from flexllm.ops.gpu import attention, rowwise
from flexllm.ops.reference import LinearWeight, ReferenceKernels

_HALF = (torch.float16, torch.bfloat16)
_FUSED = (*_HALF, torch.float32)
LOGITS = 2**27  # at a time, in fp32: half a gigabyte


class CudaKernels(ReferenceKernels):
    name = "cuda"
    head_rows = 1024

    # ------------------------------------------------------------------------------- one pass over memory each
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rowwise.rms_norm(x, weight, eps) if x.dtype in _FUSED and x.dim() == 2 else super().rms_norm(x, weight, eps)

    def rms_norm_dx(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rowwise.rms_norm_dx(dy, x, weight, eps) if x.dtype in _FUSED and x.dim() == 2 else super().rms_norm_dx(dy, x, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rowwise.rope(x, cos, sin, back=False) if x.dtype in _FUSED else super().rope(x, cos, sin)

    def rope_transpose(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rowwise.rope(dy, cos, sin, back=True) if dy.dtype in _FUSED else super().rope_transpose(dy, cos, sin)

    def swiglu(self, g: Tensor, u: Tensor) -> Tensor:
        return rowwise.swiglu(g, u) if g.dtype in _FUSED else super().swiglu(g, u)

    def swiglu_backward(self, dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return rowwise.swiglu_backward(dm, g, u) if g.dtype in _FUSED else super().swiglu_backward(dm, g, u)

    # ---------------------------------------------------------------------------------------------------- attention
    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
        if q.dtype not in _FUSED:
            return super().decode_attention(q, k_cache, v_cache, slots, lengths, scale)
        return attention.decode_attention(q, k_cache, v_cache, slots, lengths, scale)

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if not _has_flash(q):
            return super().window_attention(q, k, v, scale)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, q.shape[0], k.shape[0], 0.0, True, False, scale=scale
        )  # causal masks are aligned at the bottom right
        return out[0], lse[0].t().contiguous()

    def window_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Through the variable-length form, whose cumulative lengths are required arguments."""
        if not _has_flash(q):
            return super().window_attention_backward(do, q, k, v, o, lse, scale)
        ends = [torch.tensor([0, t.shape[0]], dtype=torch.int32, device=q.device) for t in (q, k)]
        rng = torch.empty(2, dtype=torch.int64, device=q.device)  # no dropout: not read
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), o.contiguous(), lse.t().contiguous(),
            *ends, q.shape[0], k.shape[0], 0.0, True, rng, rng, scale=scale,
        )  # fmt: skip
        return dq, dk.float(), dv.float()

    # ------------------------------------------------------------------- what these hold while they run (compiler/workspace.py)
    def attention_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:
        """The gathered K and V (fp32 would need scores: it is for tests)."""
        return 4 * b * kv_heads * hd + 4 * s * heads

    def attention_backward_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:
        """K and V, copies of dO, Q and O, dQ in fp32, dK and dV of each query head and summed."""
        return 4 * b * kv_heads * hd + 10 * s * heads * hd + 4 * b * heads * hd + 12 * b * kv_heads * hd

    def head_bytes(self, rows: int, vocab: int, hidden: int, itemsize: int) -> int:
        chunk = min(rows, max(1, LOGITS // vocab))
        return chunk * vocab * (2 * max(4, itemsize) + itemsize) + 2 * rows * hidden * itemsize

    # --------------------------------------------------------------------------------------------------------- loss
    def cross_entropy_head(
        self, h: Tensor, head: LinearWeight, labels: Tensor, grad_scale: float, backward: bool = True
    ) -> tuple[float, int, Tensor | None]:
        """As the reference, in larger chunks, waiting for the device once."""
        dh = torch.empty_like(h) if backward else None
        sums = torch.zeros(2, dtype=torch.float64, device=h.device)  # loss, correct
        rows = max(1, LOGITS // head.shape[0])
        for i in range(0, h.shape[0], rows):
            chunk, y = slice(i, i + rows), labels[i : i + rows, None]
            z = self.linear(h[chunk], head).to(torch.promote_types(h.dtype, torch.float32))
            lse, label = z.logsumexp(-1, keepdim=True), z.gather(1, y)
            sums[0] += (lse - label).sum()
            sums[1] += (z.argmax(-1, keepdim=True) == y).sum()
            if dh is not None:
                z.sub_(lse).exp_().scatter_add_(1, y, torch.full_like(label, -1.0))
                dh[chunk] = self.linear_dx(z.mul_(grad_scale).to(h.dtype), head)
        loss, correct = sums.tolist()
        return loss, int(correct), dh


def _has_flash(q: Tensor) -> bool:
    return q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
