"""Products with the small matrices of an adapter, for few rows: what they cost elsewhere is the call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexllm.ops.native.blocks import LANES, PANEL, ROWS, product
from flexllm.ops.native.runtime import Kernel, arguments, down, itemsize, matrix, next_task, numbers, whole_units, widen


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """x [N, in] w^T for a small w [R, in]."""
    x, w = matrix(x), w.contiguous()
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    tasks, step = _row_blocks(x.shape[0])
    _matmul_nt[x.dtype](tasks, x.nbytes, step, *x.shape, w.shape[0], x.stride(0), x, w, y)
    return y


def _row_blocks(rows: int) -> tuple[int, int]:
    """(tasks, rows of a task): whole ROWS, and a few tasks for each thread."""
    step = max(ROWS, min(32, -(-rows // (4 * ROWS)) * ROWS))
    return -(-rows // step), step


@Kernel
def _matmul_nt(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, width, rank, stride = a[2], a[3], a[4], a[5], a[6]
    packed, y = numbers(memory, a[8], (rank, width)), numbers(memory, a[9], (rows, rank))
    w, x = np.zeros((whole_units(rank, 2), width), np.float32), np.zeros((ROWS, width), np.float32)
    for k in range(rank):
        widen(packed[k], w[k])
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step), ROWS):
            count = min(ROWS, rows - row)
            for r in range(count):
                widen(numbers(memory, a[7] + size * (row + r) * stride, width), x[r])
            for k in range(0, rank, 2):
                s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0)
                for i in range(width):  # every number that is loaded is used twice or more
                    e, f = w[k, i], w[k + 1, i]
                    s0 += x[0, i] * e
                    s1 += x[1, i] * e
                    s2 += x[2, i] * e
                    s3 += x[3, i] * e
                    t0 += x[0, i] * f
                    t1 += x[1, i] * f
                    t2 += x[2, i] * f
                    t3 += x[3, i] * f
                for r, s, t in ((0, s0, t0), (1, s1, t1), (2, s2, t2), (3, s3, t3)):
                    if r < count:
                        y[row + r, k] = down(memory, s)
                        if k + 1 < rank:
                            y[row + r, k + 1] = down(memory, t)
        task = next_task(a)


def add_matmul_nn_(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """y + x w into y [N, out], a column slice perhaps, for a small w [R, out]; rounded once."""
    x, w = x.contiguous(), w.contiguous()
    assert y.stride(1) == 1, y.stride()
    tasks, step = _row_blocks(y.shape[0])
    _add_matmul_nn[y.dtype](tasks, 2 * y.nbytes, step, *y.shape, w.shape[0], y.stride(0), x, w, y)
    return y


@Kernel
def _add_matmul_nn(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, width, rank, stride = a[2], a[3], a[4], a[5], a[6]
    left, packed, padded = numbers(memory, a[7], (rows, rank)), numbers(memory, a[8], (rank, width)), whole_units(width, LANES)
    w, x, sums = np.zeros((rank, padded), np.float32), np.zeros((ROWS, rank), np.float32), np.zeros((ROWS, padded), np.float32)
    for k in range(rank):
        widen(packed[k], w[k])
    w_at, x_at, sums_at = w.ctypes.data, x.ctypes.data, sums.ctypes.data
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step), ROWS):
            count = min(ROWS, rows - row)
            for r in range(count):
                widen(numbers(memory, a[9] + size * (row + r) * stride, width), sums[r])
                widen(left[row + r], x[r])
            product(x_at, rank, 1, w_at, padded, PANEL, sums_at, padded, ROWS, rank, padded, 1)
            for r in range(count):
                y = numbers(memory, a[9] + size * (row + r) * stride, width)
                for i in range(width):
                    y[i] = down(memory, sums[r, i])
        task = next_task(a)
