"""Decode attention over the pages: one query row per request, its keys divided among programs, their parts joined afterwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # at a time
FEWEST = 256  # keys of a part
FEWEST_OF_A_DOT = 16  # rows and columns of a tile in a matrix product
PROGRAMS = 264  # as many parts as give about so many programs: two for each multiprocessor of the largest devices


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """q [B, H, hd]; caches [num_slots, K, hd]; slots [B, C] int64; lengths [B] int64 -> [B, H, hd] (ReferenceKernels.decode_attention)."""
    (batch, heads, hd), kv_heads, context = q.shape, k_cache.shape[1], slots.shape[1]
    assert q.stride(2) == k_cache.stride(2) == v_cache.stride(2) == slots.stride(1) == 1
    assert k_cache.stride() == v_cache.stride()
    parts = max(1, min(triton.cdiv(PROGRAMS, batch * kv_heads), triton.cdiv(context, FEWEST)))
    keys_per_part = triton.cdiv(triton.cdiv(context, parts), KEYS) * KEYS
    out = torch.empty(batch, heads, parts, hd, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, parts, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    _attend[batch, kv_heads, parts](
        q, k_cache, v_cache, slots, lengths, out, lse, scale, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
        slots.stride(0), keys_per_part, parts, heads, hd,
        GROUP=group, ROWS=_tile(group), HD=_tile(hd), KEYS=KEYS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    result = torch.empty(batch, heads, hd, dtype=q.dtype, device=q.device)
    _join[batch * heads,](out, lse, result, parts, hd, HD=triton.next_power_of_2(hd))
    return result


def _tile(size: int) -> int:
    return max(FEWEST_OF_A_DOT, triton.next_power_of_2(size))


@triton.jit(do_not_specialize=["keys_per_part", "parts", "slot_stride"])
def _attend(
    q, k_cache, v_cache, slots, lengths, out, lse, scale, q_batch, q_head, kv_slot, kv_head, slot_stride, keys_per_part, parts, heads, hd,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HD: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One request, one key/value head with the query heads of its group, one part of the keys."""
    b, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    r, i = tl.arange(0, ROWS), tl.arange(0, HD)
    head = kv * GROUP + r
    query = tl.load(q + b * q_batch + head[:, None] * q_head + i[None, :], (r < GROUP)[:, None] & (i < hd)[None, :], 0)
    first = part * keys_per_part
    last = tl.minimum(tl.load(lengths + b).to(tl.int32), first + keys_per_part)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, HD], tl.float32)
    for start in range(first, last, KEYS):
        n = start + tl.arange(0, KEYS)
        slot = tl.load(slots + b * slot_stride + n, n < last, 0)
        at = slot[:, None] * kv_slot + kv * kv_head + i[None, :]
        seen = (n < last)[:, None] & (i < hd)[None, :]
        k = tl.load(k_cache + at, seen, 0)
        v = tl.load(v_cache + at, seen, 0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((n < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, 1)
        o = o * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    at = (b * heads + head) * parts + part
    empty = total == 0
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), r < GROUP)
    share = o / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + at[:, None] * hd + i[None, :], share, (r < GROUP)[:, None] & (i < hd)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _join(out, lse, result, parts, hd, HD: tl.constexpr):
    """The parts of one row of one head, each as heavy as its exponentials."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, HD)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    o = tl.zeros([HD], tl.float32)
    for part in range(parts):
        weight = tl.load(lse + row * parts + part)
        higher = tl.maximum(top, weight)  # the first part is never empty: a finite number
        fade, more = tl.exp(top - higher), tl.exp(weight - higher)
        o = o * fade + more * tl.load(out + (row * parts + part) * hd + i, i < hd, 0)
        total = total * fade + more
        top = higher
    tl.store(result + row * hd + i, o / total, i < hd)
