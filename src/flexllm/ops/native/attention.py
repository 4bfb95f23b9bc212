"""Attention over pages and windows. Legend as in reference.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexllm.ops.native.blocks import LANES, PANEL, ROWS, panels_of, product, rows_of
from flexllm.ops.native.runtime import (
    Kernel,
    arguments,
    as_float64,
    down,
    exp,
    f32,
    i64,
    inline,
    itemsize,
    next_task,
    numbers,
    pointer,
    prefetch,
    softmax,
    up,
    whole_units,
    widen,
)

AHEAD = 8  # positions whose K and V are asked for before they are read: pages are scattered, and the hardware does not guess them
TILE = 32  # query rows of a task


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See ReferenceKernels.decode_attention. Reads the pages where they are; a task is a request, or a KV head of one."""
    (batch, heads, hd), (num_slots, kv_heads, _) = q.shape, k_cache.shape
    q, context = q.contiguous(), slots.stride(0)
    assert k_cache.is_contiguous(), k_cache.stride()
    assert v_cache.is_contiguous(), v_cache.stride()
    assert slots.stride(1) == 1, slots.stride()
    o = torch.empty_like(q)
    scores = torch.empty(batch, heads, context)
    parts = kv_heads if batch < 2 * torch.get_num_threads() else 1  # whole requests read their pages in one stream
    nbytes = 4 * batch * context * kv_heads * hd  # K and V
    _decode_attention[q.dtype](
        batch * parts, nbytes, batch, kv_heads, heads // kv_heads, hd, context, num_slots, scale,
        q, k_cache, v_cache, slots, lengths, scores, o,
    )  # fmt: skip
    return o


@Kernel
def _decode_attention(memory):
    a = arguments(memory)
    hd = a[5]
    if hd == 64:  # constants, so that the loops over a head unroll
        _decode_heads(memory, a, 64)
    elif hd == 128:
        _decode_heads(memory, a, 128)
    else:
        _decode_heads(memory, a, hd)


@inline
def _decode_heads(memory, a, hd):
    size, batch, kv_heads, group, context, num_slots = itemsize(memory), a[2], a[3], a[4], a[6], a[7]
    scale, tasks = np.float32(as_float64(a[8])), a[1]
    heads, parts = kv_heads * group, tasks // batch
    own = kv_heads // parts  # KV heads of a task
    queries, o = numbers(memory, a[9], (batch, heads, hd)), numbers(memory, a[15], (batch, heads, hd))
    keys, values = numbers(memory, a[10], (num_slots, kv_heads, hd)), numbers(memory, a[11], (num_slots, kv_heads, hd))
    slots, lengths, scratch = i64(a[12], (batch, context)), i64(a[13], batch), f32(a[14], (batch, heads, context))
    q, sums = np.empty((heads, hd), np.float32), np.empty((heads, hd), np.float32)
    row, other = np.empty(hd, np.float32), np.empty(hd, np.float32)
    task = next_task(a)
    while task < tasks:
        owner, first = task // parts, task % parts * own
        n, seen, p = lengths[owner], slots[owner], scratch[owner]
        for h in range(first * group, (first + own) * group):
            for i in range(hd):
                q[h, i] = up(queries[owner, h, i]) * scale
                sums[h, i] = np.float32(0)
        for c in range(n):
            prefetch(a[10] + size * (seen[min(c + AHEAD, n - 1)] * kv_heads + first) * hd, size * own * hd)
            for kv in range(first, first + own):
                k = keys[seen[c], kv]
                widen(k, row)
                for h in range(kv * group, (kv + 1) * group):
                    s = np.float32(0)
                    for i in range(hd):
                        s += q[h, i] * row[i]
                    p[h, c] = s
        for h in range(first * group, (first + own) * group):
            softmax(p[h], n)
        for c in range(0, n - 1, 2):  # two positions at a time: half the traffic to the sums
            for step in range(2):
                prefetch(a[11] + size * (seen[min(c + step + AHEAD, n - 1)] * kv_heads + first) * hd, size * own * hd)
            for kv in range(first, first + own):
                v, w = values[seen[c], kv], values[seen[c + 1], kv]
                for i in range(hd):
                    row[i], other[i] = up(v[i]), up(w[i])
                for h in range(kv * group, (kv + 1) * group):
                    x, y = p[h, c], p[h, c + 1]
                    for i in range(hd):
                        sums[h, i] += x * row[i] + y * other[i]
        for kv in range(first, first + own):
            v = values[seen[n - 1], kv]
            for h in range(kv * group, (kv + 1) * group):
                x = p[h, n - 1] if n % 2 else np.float32(0)
                for i in range(hd):
                    o[owner, h, i] = down(memory, sums[h, i] + x * up(v[i]))
        task = next_task(a)


def window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ReferenceKernels.window_attention; any type up to fp32. Products are fp32, exact to the diagonal but for half a block."""
    (s, heads, hd), (b, kv_heads, _) = q.shape, k.shape
    queries, keys, values = rows_of(q).mul_(scale), panels_of(rows_of(k)), rows_of(v)
    o, lse = torch.empty(s, heads, hd), torch.empty(s, heads)
    tiles = -(-s // TILE)
    _window_attention[torch.float32](
        tiles * heads, 4 * keys.nbytes, s, b, heads, kv_heads, hd, *values.shape[1:], queries, keys, values, o, lse
    )
    return o.to(q.dtype), lse


@Kernel
def _window_attention(memory):
    a = arguments(memory)
    s, b, heads, kv_heads, hd, columns, width = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    group = heads // kv_heads
    padded = whole_units(s, PANEL)
    o, lse = f32(a[12], (s, heads, hd)), f32(a[13], (s, heads))
    pitch = columns + LANES  # not a power of two: rows in different cache sets
    scores, sums = np.empty((TILE, pitch), np.float32), np.empty((TILE, width), np.float32)
    p_at, sums_at = scores.ctypes.data, sums.ctypes.data
    task = next_task(a)
    while task < a[1]:
        head, first = task % heads, (a[1] // heads - 1 - task // heads) * TILE  # long tiles first
        rows = min(TILE, s - first)
        whole = whole_units(rows, ROWS)
        n = b - s + first + rows
        q_at = a[9] + 4 * (head * padded + first) * width
        k_at, v_at = a[10] + 4 * (head // group) * width * columns, a[11] + 4 * (head // group) * width * columns
        product(q_at, width, 1, k_at, PANEL, width * PANEL, p_at, pitch, whole, width, whole_units(n, PANEL), 0)
        for r in range(whole):
            p = scores[r]
            for c in range(b - s + first + r + 1, whole_units(n, PANEL)):
                p[c] = np.float32(-np.inf)
            logsumexp = softmax(p, whole_units(n, PANEL))
            if r < rows:
                lse[first + r, head] = logsumexp
        product(p_at, pitch, 1, v_at, width, PANEL, sums_at, width, whole, n, width, 0)
        for r in range(rows):
            for i in range(hd):
                o[first + r, head, i] = sums[r, i]
        task = next_task(a)


def window_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ReferenceKernels.window_attention_backward (algorithms.md 2.1); delta = sum(P dP), which needs no output."""
    (s, heads, hd), (b, kv_heads, _) = q.shape, k.shape
    queries, key_rows = rows_of(q).mul_(scale), rows_of(k)
    keys, values = panels_of(key_rows), panels_of(rows_of(v))
    columns, width = key_rows.shape[1:]
    teams = torch.get_num_threads()
    dq, dkv = torch.empty(s, heads, hd), torch.zeros(teams, 2, kv_heads, columns, width)
    tiles, member = -(-s // TILE), torch.zeros(1, dtype=torch.int64)
    _window_attention_backward[torch.float32](
        tiles * heads, 10 * keys.nbytes, s, b, heads, kv_heads, hd, columns, width, scale,
        queries, keys, key_rows, values, rows_of(do), lse.contiguous(), dq, dkv, member,
    )  # fmt: skip
    dk, dv = (dkv.sum(0) if teams > 1 else dkv[0])[:, :, :b, :hd].transpose(1, 2)
    return dq.to(q.dtype), dk, dv


@Kernel
def _window_attention_backward(memory):
    a = arguments(memory)
    s, b, heads, kv_heads, hd, columns, width, scale = a[2], a[3], a[4], a[5], a[6], a[7], a[8], np.float32(as_float64(a[9]))
    group, padded, pitch = heads // kv_heads, whole_units(s, PANEL), columns + LANES
    lse, dq = f32(a[15], (s, heads)), f32(a[16], (s, heads, hd))
    member = next_task(pointer(a[18], np.int64(0)))  # each thread sums dK and dV apart
    head_bytes = 4 * columns * width
    probabilities, gradients = np.empty((TILE, pitch), np.float32), np.empty((TILE, pitch), np.float32)
    sums = np.empty((TILE, width), np.float32)
    p_at, ds_at, sums_at = probabilities.ctypes.data, gradients.ctypes.data, sums.ctypes.data
    task = next_task(a)
    while task < a[1]:
        head, first = task % heads, (a[1] // heads - 1 - task // heads) * TILE  # long tiles first
        rows, kv = min(TILE, s - first), head // group
        whole, n = whole_units(rows, ROWS), b - s + first + rows
        wide = whole_units(n, PANEL)
        q_at, do_at = a[10] + 4 * (head * padded + first) * width, a[14] + 4 * (head * padded + first) * width
        dk_at = a[17] + (member * 2 * kv_heads + kv) * head_bytes
        dv_at = dk_at + kv_heads * head_bytes
        product(q_at, width, 1, a[11] + kv * head_bytes, PANEL, width * PANEL, p_at, pitch, whole, width, wide, 0)  # S
        product(do_at, width, 1, a[13] + kv * head_bytes, PANEL, width * PANEL, ds_at, pitch, whole, width, wide, 0)  # dP
        for r in range(whole):
            p, ds = probabilities[r], gradients[r]
            seen = b - s + first + r + 1 if r < rows else 0
            for c in range(seen, wide):
                p[c] = np.float32(-np.inf)
            norm, delta = lse[first + r, head] if r < rows else np.float32(0), np.float32(0)
            for c in range(wide):
                p[c] = exp(p[c] - norm)
                delta += p[c] * ds[c]
            for c in range(wide):
                ds[c] = p[c] * (ds[c] - delta)
        product(ds_at, pitch, 1, a[12] + kv * head_bytes, width, PANEL, sums_at, width, whole, n, width, 0)  # dQ = dS K
        product(ds_at, 1, pitch, q_at, width, PANEL, dk_at, width, whole_units(n, ROWS), whole, width, 1)  # dK += dS^T Q
        product(p_at, 1, pitch, do_at, width, PANEL, dv_at, width, whole_units(n, ROWS), whole, width, 1)  # dV += P^T dO
        for r in range(rows):
            for i in range(hd):
                dq[first + r, head, i] = sums[r, i] * scale
        task = next_task(a)
