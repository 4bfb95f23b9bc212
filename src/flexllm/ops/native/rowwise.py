"""Normalisation, RoPE and SwiGLU with their gradients, row by row, in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexllm.ops.native.runtime import Kernel, arguments, as_float64, down, exp, itemsize, matrix, next_task, numbers, split, up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    x = matrix(x)
    tasks, step = split(x.shape[0], 4 * x.shape[1])
    _rms_norm[x.dtype](tasks, 2 * y.nbytes, step, *x.shape, x.stride(0), eps, x, weight, y)
    return y


@Kernel
def _rms_norm(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, d, stride = a[2], a[3], a[4], a[5]
    eps, weight, y = np.float32(as_float64(a[6])), numbers(memory, a[8], d), numbers(memory, a[9], (rows, d))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            x, out = numbers(memory, a[7] + size * row * stride, d), y[row]
            s = np.float32(0)
            for i in range(d):
                v = up(x[i])
                s += v * v
            r = np.float32(1) / np.sqrt(s / np.float32(d) + eps)
            for i in range(d):
                out[i] = down(memory, up(down(memory, up(x[i]) * r)) * up(weight[i]))
        task = next_task(a)


def rms_norm_dx(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx = r (g dy - xh mean(g dy xh)), xh = x r."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dy, x = matrix(dy), matrix(x)
    tasks, step = split(x.shape[0], 6 * x.shape[1])
    _rms_norm_dx[x.dtype](tasks, 3 * dx.nbytes, step, *x.shape, dy.stride(0), x.stride(0), eps, dy, x, weight, dx)
    return dx


@Kernel
def _rms_norm_dx(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, d = a[2], a[3], a[4]
    eps, weight, result = np.float32(as_float64(a[7])), numbers(memory, a[10], d), numbers(memory, a[11], (rows, d))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            dy, x, dx = numbers(memory, a[8] + size * row * a[5], d), numbers(memory, a[9] + size * row * a[6], d), result[row]
            square, inner = np.float32(0), np.float32(0)
            for i in range(d):
                v = up(x[i])
                square += v * v
                inner += up(dy[i]) * up(weight[i]) * v
            r = np.float32(1) / np.sqrt(square / np.float32(d) + eps)
            mean = inner * r * r / np.float32(d)
            for i in range(d):
                dx[i] = down(memory, r * (up(dy[i]) * up(weight[i]) - up(x[i]) * mean))
        task = next_task(a)


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate each head of x [N, H*hd], or rotate it back; cos, sin [N, hd]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    x = matrix(x)
    tasks, step = split(x.shape[0], 4 * x.shape[1])
    _rope[x.dtype](tasks, 2 * y.nbytes, step, *x.shape, x.stride(0), cos.shape[1], -1.0 if back else 1.0, x, cos, sin, y)
    return y


@Kernel
def _rope(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, width, stride, hd = a[2], a[3], a[4], a[5], a[6]
    sign, half = np.float32(as_float64(a[7])), hd // 2
    cosines, sines, y = numbers(memory, a[9], (rows, hd)), numbers(memory, a[10], (rows, hd)), numbers(memory, a[11], (rows, width))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            x, cos, sin = numbers(memory, a[8] + size * row * stride, width), cosines[row], sines[row]
            for head in range(0, width, hd):
                x1, x2, y1, y2 = x[head : head + half], x[head + half :], y[row, head : head + half], y[row, head + half :]
                for i in range(half):
                    u, v, c, s = up(x1[i]), up(x2[i]), up(cos[i]), up(sin[i]) * sign
                    y1[i], y2[i] = down(memory, u * c - v * s), down(memory, v * c + u * s)
        task = next_task(a)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    y = torch.empty(g.shape, dtype=g.dtype)
    g, u = matrix(g), matrix(u)
    tasks, step = split(g.shape[0], 6 * g.shape[1])
    _swiglu[g.dtype](tasks, 3 * y.nbytes, step, *g.shape, g.stride(0), u.stride(0), g, u, y)
    return y


@Kernel
def _swiglu(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, width = a[2], a[3], a[4]
    y = numbers(memory, a[9], (rows, width))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            g, u, out = numbers(memory, a[7] + size * row * a[5], width), numbers(memory, a[8] + size * row * a[6], width), y[row]
            for i in range(width):
                v = up(g[i])
                out[i] = down(memory, v / (np.float32(1) + exp(-v)) * up(u[i]))
        task = next_task(a)


def swiglu_backward(dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(dg, du), algorithms.md 4.2: the halves of one matrix, so that the gradient of their linear needs no copy."""
    rows, width = g.shape
    dm, g, u = matrix(dm), matrix(g), matrix(u)
    both = torch.empty(rows, 2 * width, dtype=g.dtype)
    tasks, step = split(rows, 10 * width)
    _swiglu_backward[g.dtype](tasks, 5 * dm.nbytes, step, rows, width, dm.stride(0), g.stride(0), u.stride(0), dm, g, u, both)
    return both[:, :width], both[:, width:]


@Kernel
def _swiglu_backward(memory):
    a, size = arguments(memory), itemsize(memory)
    step, rows, width = a[2], a[3], a[4]
    both = numbers(memory, a[11], (rows, 2, width))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            dm, g, u = (
                numbers(memory, a[8] + size * row * a[5], width),
                numbers(memory, a[9] + size * row * a[6], width),
                numbers(memory, a[10] + size * row * a[7], width),
            )
            dg, du = both[row, 0], both[row, 1]
            for i in range(width):
                v, d = up(g[i]), up(dm[i])
                sigmoid = np.float32(1) / (np.float32(1) + exp(-v))
                dg[i] = down(memory, d * up(u[i]) * sigmoid * (np.float32(1) + v * (np.float32(1) - sigmoid)))
                du[i] = down(memory, d * v * sigmoid)
        task = next_task(a)
