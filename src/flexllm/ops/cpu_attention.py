"""Attention on a CPU as plain batched GEMMs (oneDNN runs them in bf16; torch's own CPU attention does not use it).

The query heads that share a KV head are folded into the rows of its matrices: K matrices of s*G rows, G = H / K. A window
is cut into tiles of query rows, and a tile's keys end at its last row, so that all but the corner of the upper triangle is
never computed. What a tile needs stays small enough for the allocator to hand out the same, warm memory again.
Legend as in reference.py; n keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexllm.ops.reference import compute_dtype

TILE_ROWS = 128
TILE_SCORES = 2**20  # elements of one tile's score matrix, all heads


def window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ReferenceKernels.window_attention. Scores and softmax in the compute type, P rounded to the model's for P V."""
    if q.shape[0] == k.shape[0]:
        return _square_attention(q, k, v, scale)
    (s, heads, _), (b, kv_heads, _) = q.shape, k.shape
    dtype = compute_dtype(q.dtype)
    group = heads // kv_heads
    rows = _fold(q.to(dtype) * scale, kv_heads)  # [K, s*G, hd]
    keys = k.transpose(0, 1).to(dtype).transpose(1, 2)  # [K, hd, b]
    values = v.transpose(0, 1).contiguous()
    o = torch.empty_like(rows, dtype=q.dtype)
    lse = rows.new_empty(rows.shape[:2])
    above = _above_diagonal(min(s, TILE_ROWS), dtype)
    for start, end in _tiles(s, b, heads):
        n, tile = b - s + end, slice(start * group, end * group)
        p = torch.bmm(rows[:, tile], keys[..., :n])
        p.unflatten(1, (-1, group))[..., n - end + start :] += above[: end - start, :, : end - start]
        top = p.amax(-1)
        torch.softmax(p, -1, out=p)
        torch.sub(top, p.amax(-1).log_(), out=lse[:, tile])  # the largest probability is exp(top - lse)
        torch.bmm(p.to(q.dtype), values[:, :n], out=o[:, tile])
    return _unfold(o, s), _unfold(lse[..., None], s).squeeze(-1)


def _square_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A window that begins its sequence: torch's flash kernel, whose causal mask is top-left aligned, fits and is faster."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).transpose(0, 1)[None] for t in (k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = attend(q.transpose(0, 1)[None], k, v, 0.0, True, scale=scale)
    return o[0].transpose(0, 1), lse[0].t()


def window_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ReferenceKernels.window_attention_backward.

    Every tile matrix is in the model's type. What would lose by that are differences of close numbers, S - lse and
    dO V^T - delta: two more columns subtract them inside the GEMM, before it rounds. S is taken relative to
    c = lse - ln(2^e), 2^e ~ sqrt(b), which lies between the scores of flat and of peaked rows; dO is scaled by 2^-e in return.
    """
    (s, heads, hd), (b, kv_heads, _) = q.shape, k.shape
    dtype = compute_dtype(q.dtype)
    group = heads // kv_heads
    power, rest = _power_of_two(scale)
    e = round(math.log2(b) / 2)
    rows = q.new_empty(2, s, heads, hd + 2)
    torch.mul(q, power, out=rows[0, ..., :hd])
    torch.mul(do, 2.0**-e, out=rows[1, ..., :hd])
    delta = (do.to(dtype) * o.to(dtype)).sum(-1)
    minus = torch.stack(((lse - e * math.log(2)) / rest, delta * 2.0**-e))
    rows[..., hd] = minus  # rounded, then what the rounding left
    torch.sub(minus, rows[..., hd], out=rows[..., hd + 1])
    q_ext, do_ext = rows.view(2, s, kv_heads, -1).transpose(1, 2).reshape(2, kv_heads, -1, hd + 2)  # [K, s*G, hd+2]
    k_ext, v_ext = pad(torch.stack((k, v)).transpose(1, 2), (0, 2), value=-1.0)  # [K, b, hd+2]
    q_rows, do_rows, keys = q_ext[..., :hd], do_ext[..., :hd], k_ext[..., :hd]
    dq = q_ext.new_empty(q_rows.shape)
    above = _above_diagonal(min(s, TILE_ROWS), q.dtype)
    for start, end in _tiles(s, b, heads):
        n, tile = b - s + end, slice(start * group, end * group)
        p = torch.bmm(q_ext[:, tile], k_ext[:, :n].transpose(1, 2))
        p.unflatten(1, (-1, group))[..., n - end + start :] += above[: end - start, :, : end - start]
        if rest != 1.0:
            p *= rest
        p.exp_()  # 2^e times the probabilities
        ds = torch.bmm(do_ext[:, tile], v_ext[:, :n].transpose(1, 2)).mul_(p)
        torch.bmm(ds, keys[:, :n], out=dq[:, tile])
        dk_tile = torch.bmm(ds.transpose(1, 2), q_rows[:, tile]).to(dtype)
        dv_tile = torch.bmm(p.transpose(1, 2), do_rows[:, tile]).to(dtype)
        if end == s:  # the first tile sees every key
            dk, dv = dk_tile, dv_tile
        else:
            dk[:, :n] += dk_tile
            dv[:, :n] += dv_tile
    if rest != 1.0:
        dk *= rest
    return _unfold(dq, s) * scale, dk.transpose(0, 1), dv.transpose(0, 1)


def _tiles(s: int, b: int, heads: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a window, the last rows first."""
    end = s
    while end > 0:
        rows = min(TILE_ROWS, max(16, TILE_SCORES // (heads * (b - s + end))))
        start = max(0, end - rows)
        yield start, end
        end = start


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[s, H, c] -> [K, s*G, c]."""
    s, _, c = x.shape
    return x.reshape(s, kv_heads, -1).transpose(0, 1).reshape(kv_heads, -1, c)


def _unfold(x: Tensor, s: int) -> Tensor:
    """[K, s*G, c] -> [s, H, c]."""
    kv_heads, _, c = x.shape
    return x.view(kv_heads, s, -1).transpose(0, 1).reshape(s, -1, c)


def _above_diagonal(rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, rows]: -inf above the diagonal, else 0."""
    return torch.full((rows, rows), -math.inf, dtype=dtype).triu_(1)[:, None]


def _power_of_two(scale: float) -> tuple[float, float]:
    """scale = power * rest, power a power of two (exact to multiply by in any float type) and 1 <= rest < 2."""
    mantissa, exponent = math.frexp(scale)
    return 2.0 ** (exponent - 1), 2 * mantissa
