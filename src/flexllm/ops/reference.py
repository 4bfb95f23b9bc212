"""The kernels in plain torch: the meaning of every operator, and the oracle for the fast ones in cpu.py and cuda.py.

Legend: N rows of the flat token axis, s rows of one window, b keys visible to its last row (b >= s), B decoding requests,
d hidden size, H query heads, K key/value heads, hd head size, R rank columns, V vocabulary.
Works in any float type; where the model is bf16 or fp16, normalisation, softmax and the loss are computed in fp32
(float64 stays float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flexllm.ops.quantized import QuantizedWeight


@dataclass(eq=False)
class LinearWeight:
    """A frozen weight [out, in], dense or in blocks, and, where the device gains by it, a packed copy of a dense one."""

    weight: Tensor | QuantizedWeight
    packed: Any = None

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def dense(self) -> Tensor:
        """[out, in] in the model's type; of a quantized weight a new tensor at each call."""
        return self.weight.dense() if isinstance(self.weight, QuantizedWeight) else self.weight


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def dropout_factors(seeds: Tensor, rates: Tensor, columns: int, layer: int, salt: int) -> Tensor:
    """0 or 1 / (1 - rate) for each element, fp32 [N, columns], from a counter-based hash (a finalizer of the splitmix64 family)."""
    row = _mix(seeds + (layer * 64 + salt) * 0x632BE59BD9B4E019 % 2**63)
    element = _mix(row[:, None] + torch.arange(columns, device=seeds.device) * 0x1E3779B97F4A7C15)
    uniform = (element >> 40 & 0xFFFFFF).to(torch.float32) / 2**24
    return (uniform >= rates[:, None]) / (1 - rates[:, None])


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64, wrapping; every input bit reaches every output bit."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


class ReferenceKernels:
    """One method per kernel. Nothing is written in place unless its name says so (`*_`)."""

    name = "reference"
    head_rows = 128  # of a window that go through the loss head before a newcomer is looked for

    # ------------------------------------------------------------------------------------------------------- linear
    def pack_linear(self, weight: Tensor | QuantizedWeight) -> LinearWeight:
        return LinearWeight(weight)

    def dense(self, w: LinearWeight) -> Tensor:
        """The weight [out, in] that an ordinary GEMM takes."""
        return w.dense()

    def linear(self, x: Tensor, w: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """x [N, in] -> [N, out]."""
        return torch.nn.functional.linear(x, self.dense(w), bias)

    def linear_dx(self, dy: Tensor, w: LinearWeight) -> Tensor:
        """dy [N, out] -> dx [N, in]."""
        return dy @ self.dense(w)

    def matmul_nt(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, in], w [R, in] -> x w^T [N, R]."""
        return x @ w.t()

    def matmul_nn(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, R], w [R, out] -> x w [N, out]."""
        return x @ w

    def matmul_tn(self, a: Tensor, b: Tensor) -> Tensor:
        """a [N, R], b [N, out] -> a^T b [R, out] (a parameter's gradient)."""
        return a.t() @ b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b into a, which the caller no longer needs."""
        return a.add_(b)

    def add_matmul_nn(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """y + x w; the fused form of add(y, matmul_nn(x, w))."""
        return torch.addmm(y, x, w)

    def add_matmul_nn_(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The same into y, which the caller no longer needs. y may be a column slice."""
        return y.addmm_(x, w)

    def scale_columns(self, u: Tensor, mask: Tensor | float) -> Tensor:
        """u [N, R] * mask: a rank mask [N, R] (whose rank column belongs to the row's adapter, times its scale), or one scale."""
        return u * mask

    def scale_ranks(self, u: Tensor, d: Tensor) -> Tensor:
        """u [N, R] * d [R, 1] transposed."""
        return u * d[:, 0]

    def add_ranks(self, u: Tensor, b: Tensor) -> Tensor:
        return u + b[:, 0]

    def sum_ranks(self, g: Tensor, u: Tensor | None) -> Tensor:
        """Sums over rows, in the compute type: g * u [N, R] (or g alone) -> [R, 1]."""
        return self.sum_slot(g, u).t()

    def mul_slot(self, y: Tensor, v: Tensor, index: Tensor | int) -> Tensor:
        """y [N, C] * v [S, C] of each row's slot; index [N] int64, or one slot for all rows."""
        return y * v[index]

    def add_slot(self, y: Tensor, v: Tensor, index: Tensor | int) -> Tensor:
        return y + v[index]

    def sum_slot(self, g: Tensor, y: Tensor | None) -> Tensor:
        """Sums over rows, in the compute type: g * y [N, C] (or g alone) -> [1, C]."""
        dtype = compute_dtype(g.dtype)
        product = g.to(dtype) if y is None else g.to(dtype) * y.to(dtype)
        return product.sum(0, keepdim=True)

    def add_bias(self, y: Tensor, bias: Tensor, sign: int) -> Tensor:
        return torch.add(y, bias, alpha=sign)

    def replace_rows(self, x: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """x [N, C], v [P, C], rows [N] int64: v[rows[i]] where rows[i] >= 0, else x[i]."""
        at = (rows >= 0).nonzero()[:, 0]
        return x if len(at) == 0 else x.index_copy(0, at, v[rows[at]])

    def keep_rows(self, g: Tensor, rows: Tensor) -> Tensor:
        return g * (rows < 0)[:, None]

    def scatter_rows(self, g: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """The rows of g that stand for rows of v, each added in its place; the rest zero."""
        at = (rows >= 0).nonzero()[:, 0]
        return g.new_zeros(v.shape).index_add_(0, rows[at], g[at])

    # ------------------------------------------------------------------------------------------------------ dropout
    def dropout(self, x: Tensor, table: tuple[Tensor, Tensor], layer: int, salt: int) -> Tensor:
        """Inverted dropout. `table`: seeds [N] int64 and rates [N] of the rows; the mask of an element is a hash of its row's seed,
        `layer`, `salt` and its column, the same whenever and with whomever the row is computed. Rows of rate 0 pass as they are."""
        seeds, rates = table
        return x * dropout_factors(seeds, rates, x.shape[1], layer, salt).to(x.dtype)

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Column views."""
        return x.split_with_sizes(sizes, -1)

    def zeros(self, like: Tensor, columns: int) -> Tensor:
        """[N, columns] for `like` [N, any]."""
        return like.new_zeros(like.shape[0], columns)

    def concat(self, *parts: Tensor) -> Tensor:
        """Column slices that make up all of one tensor are that tensor: no copy of the halves that a swiglu_backward made."""
        whole = parts[0]._base
        if whole is not None and all(p._base is whole for p in parts):
            starts = [0, *accumulate(p.shape[-1] for p in parts)]
            if starts.pop() == whole.shape[-1] and starts == [p.storage_offset() for p in parts]:
                return whole
        return torch.cat(parts, dim=-1)

    # ------------------------------------------------------------------------------------------------ normalisation
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, d] * rsqrt(mean(x^2) + eps) * weight; rounded to the model's type before the product, as Llama does."""
        xf = x.to(compute_dtype(x.dtype))
        return weight * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rms_norm_dx(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """algorithms.md 4.1: dx = r (g dy - xh mean(g dy xh)), xh = x r."""
        xf = x.to(compute_dtype(x.dtype))
        r = torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
        xh = xf * r
        gdy = dy.to(xf.dtype) * weight.to(xf.dtype)
        return (r * (gdy - xh * (gdy * xh).mean(-1, keepdim=True))).to(x.dtype)

    def head_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of each head of x [N, H*hd], weight [hd] (Qwen3)."""
        return self.rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(-2)

    def head_rms_norm_dx(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        hd = weight.shape[0]
        return self.rms_norm_dx(dy.unflatten(-1, (-1, hd)), x.unflatten(-1, (-1, hd)), weight, eps).flatten(-2)

    # -------------------------------------------------------------------------------------------------- elementwise
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate each head of x [N, H*hd]; cos, sin [N, hd] in the model's type, halves repeated (rotate_half)."""
        xh = x.unflatten(-1, (-1, cos.shape[-1]))
        x1, x2 = xh.chunk(2, dim=-1)
        return (xh * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]).flatten(-2)

    def rope_transpose(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotation is orthogonal: its gradient rotates back."""
        return self.rope(dy, cos, -sin)

    def relu(self, u: Tensor) -> Tensor:
        return torch.relu(u)

    def positive_bits(self, out: Tensor) -> Tensor:
        """[N, C] -> uint8 [N, ceil(C / 8)]: bit j of byte i says whether column 8 i + j is positive."""
        bits = torch.nn.functional.pad((out > 0).to(torch.uint8), (0, -out.shape[1] % 8)).unflatten(1, (-1, 8))
        return (bits << torch.arange(8, dtype=torch.uint8, device=out.device)).sum(-1, dtype=torch.uint8)

    def where_bits(self, g: Tensor, bits: Tensor) -> Tensor:
        """g [N, C] where the bit is set, else zero."""
        shifts = torch.arange(8, dtype=torch.uint8, device=g.device)
        return g * (bits[:, :, None] >> shifts & 1).flatten(1)[:, : g.shape[1]]

    def silu(self, u: Tensor) -> Tensor:
        return torch.nn.functional.silu(u)

    def silu_backward(self, g: Tensor, u: Tensor) -> Tensor:
        dtype = compute_dtype(u.dtype)
        uf = u.to(dtype)
        s = torch.sigmoid(uf)
        return (g.to(dtype) * s * (1 + uf * (1 - s))).to(u.dtype)

    def swiglu(self, g: Tensor, u: Tensor) -> Tensor:
        return torch.nn.functional.silu(g) * u

    def swiglu_backward(self, dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(dg, du), algorithms.md 4.2."""
        dtype = compute_dtype(g.dtype)
        gf, dmf = g.to(dtype), dm.to(dtype)
        sg = torch.sigmoid(gf)
        dg = dmf * u.to(dtype) * sg * (1 + gf * (1 - sg))
        return dg.to(g.dtype), (dmf * gf * sg).to(g.dtype)

    # ---------------------------------------------------------------------------------------------------- attention
    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """One query row per request against its own cached keys.

        q [B, H, hd]; k_cache, v_cache [num_slots, K, hd]; slots [B, C] int64: cache slots of positions 0..C-1, padded
        with any valid slot; lengths [B] int64: keys that count. Returns [B, H, hd].
        """
        k, v = k_cache[slots], v_cache[slots]  # [B, C, K, hd]
        dtype = compute_dtype(q.dtype)
        groups = q.shape[1] // k.shape[2]
        qg = q.unflatten(1, (-1, groups)).to(dtype)  # [B, K, G, hd]
        scores = torch.einsum("bkgh,bckh->bkgc", qg, k.to(dtype)) * scale
        dead = torch.arange(slots.shape[1], device=q.device)[None] >= lengths[:, None]
        p = scores.masked_fill(dead[:, None, None], -math.inf).softmax(-1)
        return torch.einsum("bkgc,bckh->bkgh", p, v.to(dtype)).flatten(1, 2).to(q.dtype)

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Causal attention of s rows whose last row sees all b keys (bottom-right aligned).

        q [s, H, hd]; k, v [b, K, hd]. Returns o [s, H, hd] and lse [s, H] (fp32; float64 for float64).
        """
        scores, vg = self._scores(q, k, scale), self._expand(v, q.shape[1])
        lse = scores.logsumexp(-1)  # [H, s]
        p = (scores - lse[..., None]).exp()
        return (p @ vg).transpose(0, 1).to(q.dtype), lse.t().contiguous()

    def window_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of window_attention (algorithms.md 2.1): dq [s, H, hd] and, in fp32 (float64), dk, dv [b, K, hd]."""
        dtype = compute_dtype(q.dtype)
        heads, kv_heads = q.shape[1], k.shape[1]
        p = (self._scores(q, k, scale) - lse.t()[..., None].to(dtype)).exp()  # [H, s, b]
        dof = do.to(dtype).transpose(0, 1)  # [H, s, hd]
        delta = (dof * o.to(dtype).transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (dof @ self._expand(v, heads).transpose(1, 2) - delta) * scale
        dq = (ds @ self._expand(k, heads)).transpose(0, 1).to(q.dtype)
        dk = ds.transpose(1, 2) @ q.to(dtype).transpose(0, 1)  # [H, b, hd]
        dv = p.transpose(1, 2) @ dof
        group = heads // kv_heads
        dk, dv = (t.unflatten(0, (kv_heads, group)).sum(1).transpose(0, 1).contiguous() for t in (dk, dv))
        return dq, dk, dv

    def _expand(self, t: Tensor, heads: int) -> Tensor:
        """[b, K, hd] -> [H, b, hd], in the compute type."""
        return t.transpose(0, 1).to(compute_dtype(t.dtype)).repeat_interleave(heads // t.shape[1], 0)

    def _scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Masked scores [H, s, b]."""
        s, b = q.shape[0], k.shape[0]
        scores = q.to(compute_dtype(q.dtype)).transpose(0, 1) @ self._expand(k, q.shape[1]).transpose(1, 2) * scale
        visible = torch.arange(b, device=q.device)[None] <= torch.arange(b - s, b, device=q.device)[:, None]
        return scores.masked_fill(~visible, -math.inf)

    # ------------------------------------------------------------------- what these hold while they run (compiler/workspace.py)
    def attention_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:  # noqa: ARG002
        """window_attention of s rows over b keys, what it reads and returns left out: scores, twice, and K and V for each head."""
        return 4 * (2 * heads * s * b + 2 * heads * b * hd)

    def attention_backward_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:  # noqa: ARG002
        return 4 * (4 * heads * s * b + 6 * heads * b * hd)

    def head_bytes(self, rows: int, vocab: int, hidden: int, itemsize: int) -> int:
        """cross_entropy_head of `rows` rows: logits of a chunk in both types, and the gradient that it returns."""
        return min(rows, 64) * vocab * (2 * max(4, itemsize) + itemsize) + rows * hidden * itemsize

    # --------------------------------------------------------------------------------------------------------- loss
    def cross_entropy_head(
        self, h: Tensor, head: LinearWeight, labels: Tensor, grad_scale: float, backward: bool = True
    ) -> tuple[float, int, Tensor | None]:
        """Summed cross-entropy of h [n, d] against labels [n] (all valid), without ever holding [n, V] (algorithms.md 4.4).

        Returns (loss sum, rows whose label is the argmax, dh [n, d] = grad_scale * d(loss sum)/dh; None without `backward`).
        """
        loss, correct = 0.0, 0
        dh = torch.empty_like(h) if backward else None
        for i in range(0, h.shape[0], 64):
            hc, y = h[i : i + 64], labels[i : i + 64, None]
            z = self.linear(hc, head).to(compute_dtype(h.dtype))
            lse = z.logsumexp(-1, keepdim=True)
            loss += float((lse - z.gather(1, y)).sum())
            correct += int((z.argmax(-1, keepdim=True) == y).sum())
            if dh is not None:
                dz = (z - lse).exp_()
                dz.scatter_add_(1, y, torch.full_like(y, -1, dtype=dz.dtype))
                dh[i : i + 64] = self.linear_dx((dz * grad_scale).to(h.dtype), head)
        return loss, correct, dh
