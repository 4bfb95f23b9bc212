"""Normalisation, RoPE and SwiGLU with their gradients, a program per row, in one pass. The arithmetic is fp32.

Arguments may be column slices (rows any distance apart, columns adjacent).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of an elementwise kernel's program


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _rms_norm[(len(x),)](x, weight, y, x.stride(0), x.shape[1], eps, D=triton.next_power_of_2(x.shape[1]))
    return y


@triton.jit
def _rms_norm(x, weight, y, stride, d, eps, D: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    v = tl.load(x + row * stride + i, i < d, 0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(v * v) / d + eps)
    rounded = (v * r).to(y.dtype.element_ty).to(tl.float32)  # as Llama: to the model's type before the product
    tl.store(y + row * d + i, rounded * tl.load(weight + i, i < d, 0).to(tl.float32), i < d)


def rms_norm_dx(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx = r (g dy - xh mean(g dy xh)), xh = x r."""
    dy, x = _rows(dy), _rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        width = triton.next_power_of_2(x.shape[1])
        _rms_norm_dx[(len(x),)](dy, x, weight, dx, dy.stride(0), x.stride(0), x.shape[1], eps, D=width)
    return dx


@triton.jit
def _rms_norm_dx(dy, x, weight, dx, dy_stride, x_stride, d, eps, D: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    v = tl.load(x + row * x_stride + i, i < d, 0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(v * v) / d + eps)
    g = tl.load(dy + row * dy_stride + i, i < d, 0).to(tl.float32) * tl.load(weight + i, i < d, 0).to(tl.float32)
    v = v * r
    tl.store(dx + row * d + i, r * (g - v * (tl.sum(g * v) / d)), i < d)


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate each head of x [N, H*hd]; cos, sin [N, hd], halves repeated. `back`: by the negative angle."""
    x, hd = _rows(x), cos.shape[-1]
    heads, half = x.shape[1] // hd, hd // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
        _rope[(len(x),)](x, cos, sin, y, x.stride(0), heads, half, BACK=back, **sizes)
    return y


@triton.jit
def _rope(x, cos, sin, y, stride, heads, half, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    row, h, i = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (h < heads) & (i < half)
    at = h * 2 * half + i
    c = tl.load(cos + row * 2 * half + i, i < half, 0).to(tl.float32)
    s = tl.load(sin + row * 2 * half + i, i < half, 0).to(tl.float32)
    if BACK:
        s = -s
    a = tl.load(x + row * stride + at, inside, 0).to(tl.float32)
    b = tl.load(x + row * stride + at + half, inside, 0).to(tl.float32)
    out = y + row * heads * 2 * half + at
    tl.store(out, a * c - b * s, inside)
    tl.store(out + half, b * c + a * s, inside)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    g, u = _rows(g), _rows(u)
    y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if len(g):
        _swiglu[len(g), triton.cdiv(g.shape[1], COLUMNS)](g, u, y, g.stride(0), u.stride(0), g.shape[1], C=COLUMNS)
    return y


@triton.jit
def _swiglu(g, u, y, g_stride, u_stride, f, C: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    a = tl.load(g + row * g_stride + i, i < f, 0).to(tl.float32)
    b = tl.load(u + row * u_stride + i, i < f, 0).to(tl.float32)
    silu = (a * tl.sigmoid(a)).to(y.dtype.element_ty).to(tl.float32)  # rounded between, as two operators would
    tl.store(y + row * f + i, silu * b, i < f)


def swiglu_backward(dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """dg and du as halves of one tensor: what reads both together (ReferenceKernels.concat) needs no copy."""
    dm, g, u = _rows(dm), _rows(g), _rows(u)
    rows, f = g.shape
    both = torch.empty(rows, 2 * f, dtype=g.dtype, device=g.device)
    if rows:
        _swiglu_backward[rows, triton.cdiv(f, COLUMNS)](dm, g, u, both, dm.stride(0), g.stride(0), u.stride(0), f, C=COLUMNS)
    return both[:, :f], both[:, f:]


@triton.jit
def _swiglu_backward(dm, g, u, both, dm_stride, g_stride, u_stride, f, C: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    d = tl.load(dm + row * dm_stride + i, i < f, 0).to(tl.float32)
    a = tl.load(g + row * g_stride + i, i < f, 0).to(tl.float32)
    b = tl.load(u + row * u_stride + i, i < f, 0).to(tl.float32)
    s = tl.sigmoid(a)
    out = both + row * 2 * f + i
    tl.store(out, d * b * s * (1 + a * (1 - s)), i < f)
    tl.store(out + f, d * a * s, i < f)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
