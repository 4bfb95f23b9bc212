"""CUDA kernels. UNTESTED: no session so far had a CUDA device (tests/gpu runs them against reference.py when there is one).

Flash attention through torch's own operators. A causal window over a cache has fewer queries than keys; it is split into
the keys before the window (all visible) and the window's own square (causal), which needs no assumption about how a
kernel aligns its mask. Both halves' backward take the merged output and log-sum-exp (algorithms.md 2.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexllm.ops.reference import ReferenceKernels

_HALF = (torch.float16, torch.bfloat16)


class CudaKernels(ReferenceKernels):
    name = "cuda"

    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
        k, v = k_cache[slots].transpose(1, 2), v_cache[slots].transpose(1, 2)  # [B, K, C, hd]
        alive = torch.arange(slots.shape[1], device=q.device)[None] < lengths[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, attn_mask=alive[:, None, None], scale=scale, enable_gqa=True
        )
        return out[:, :, 0]

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if q.dtype not in _HALF:
            return super().window_attention(q, k, v, scale)
        before = k.shape[0] - q.shape[0]
        own, own_lse = _flash(q, k[before:], v[before:], scale, causal=True)
        if before == 0:
            return own, own_lse.t().contiguous()
        past, past_lse = _flash(q, k[:before], v[:before], scale, causal=False)
        lse = torch.logaddexp(past_lse, own_lse)  # [H, s]
        weights = [(part - lse).exp().t()[..., None] for part in (past_lse, own_lse)]
        return (past * weights[0] + own * weights[1]).to(q.dtype), lse.t().contiguous()

    def window_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if q.dtype not in _HALF:
            return super().window_attention_backward(do, q, k, v, o, lse, scale)
        before = k.shape[0] - q.shape[0]
        dq, dk, dv = _flash_backward(do, q, k[before:], v[before:], o, lse, scale, causal=True)
        if before:
            dq_past, dk_past, dv_past = _flash_backward(do, q, k[:before], v[:before], o, lse, scale, causal=False)
            dq, dk, dv = dq + dq_past, torch.cat((dk_past, dk)), torch.cat((dv_past, dv))
        return dq, dk.float(), dv.float()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [s, H, hd], k, v [b, K, hd] -> o [s, H, hd], lse [H, s]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, q.shape[0], k.shape[0], 0.0, causal, False, scale=scale
    )
    return out[0], lse[0]


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the variable-length form, whose cumulative lengths are required arguments; lse [s, H]."""
    ends = [torch.tensor([0, t.shape[0]], dtype=torch.int32, device=q.device) for t in (q, k)]
    rng = torch.empty(2, dtype=torch.int64, device=q.device)  # no dropout: not read
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), o.contiguous(), lse.t().contiguous(),
        *ends, q.shape[0], k.shape[0], 0.0, causal, rng, rng, scale=scale,
    )  # fmt: skip
    return dq, dk, dv
