"""bf16 loops for a CPU, compiled by numba and run by torch's own OpenMP threads.

What torch does in several passes over memory, and what it has no kernel for, is one pass here. Values are bf16 in memory (seen as
uint16) and fp32 in registers: rounded once, at the end. A second thread pool beside torch's would fight it for the cores, so a kernel
is a C function that GOMP_parallel, of the libgomp that torch has loaded, runs on every thread; each takes the next task from a shared
counter, so that a thread which loses its core does not hold up the others. A kernel's argument is an array of int64: the next task,
the number of tasks, then sizes, float64 bits and pointers in the order of the call.

Everything is in one file because numba's cache on disk only notices a change of the file that a kernel is in.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

SERIAL_BYTES = 2**15  # below this, waking the other threads costs more than they bring

# Sums may be reordered and fused (vectors of partial sums); NaN and infinity keep their meaning.
_FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "cache": True, "error_model": "numpy"}
_compile = cfunc(types.void(types.CPointer(types.int64)), **_FAST)
_inline = njit(inline="always", **_FAST)


# ------------------------------------------------------------------------------------------------------------- from Python
class Kernel:
    """A function of one argument array, compiled and run over tasks 0..tasks-1."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self._compiled: Any = None

    def _compile(self) -> None:
        """At the first call: seconds, once per machine; later processes read it from numba's cache."""
        self._compiled = _compile(self._body)
        self._address = self._compiled.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._address)

    def __call__(self, tasks: int, nbytes: int, *args: Tensor | int | float) -> None:
        """`nbytes`: what it reads and writes, roughly: a little is not worth waking the other threads for."""
        if self._compiled is None:
            self._compile()
        # Fresh bytes that nobody else sees: the kernel may count in them.
        packed = struct.pack(f"{2 + len(args)}q", 0, tasks, *[a.data_ptr() if isinstance(a, Tensor) else _bits(a) for a in args])
        threads = torch.get_num_threads()
        if threads == 1 or tasks == 1 or nbytes < SERIAL_BYTES or _team is None:
            self._alone(packed)
        else:
            _team(self._address, packed, threads, 0)


def _bits(value: int | float) -> int:
    return value if isinstance(value, int) else _float_bits(value)


@cache
def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def _find_team() -> Any:
    """GOMP_parallel(function, data, threads, flags) of torch's OpenMP runtime; None where torch has another."""
    root = Path(torch.__file__).parent
    for library in (*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")):
        team = ctypes.CDLL(str(library)).GOMP_parallel
        team.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        team.restype = None
        return team
    return None


_team = _find_team()


def _split(rows: int, row_bytes: int) -> tuple[int, int]:
    """(tasks, rows of a task): tasks large enough to be worth taking."""
    step = max(1, min(-(-rows // 2), SERIAL_BYTES // row_bytes))
    return -(-rows // step), step


def _matrix(x: Tensor) -> Tensor:
    """x [..., d] as rows whose columns are adjacent; the rows may be apart by any stride."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()


# --------------------------------------------------------------------------------------------------------- from the kernels
@intrinsic
def _next(typingctx, a):  # type: ignore[no-untyped-def]
    """The next task of the team's."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def _pointer(typingctx, address, like):  # type: ignore[no-untyped-def]
    """An address as a pointer to values of `like`'s type."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), codegen


def _bitcast(source, target, llvm):  # type: ignore[no-untyped-def]
    @intrinsic
    def cast(typingctx, value):  # type: ignore[no-untyped-def]
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], llvm)

    return cast


_as_float32 = _bitcast(types.uint32, types.float32, ir.FloatType())
_as_uint32 = _bitcast(types.float32, types.uint32, ir.IntType(32))
_as_float64 = _bitcast(types.int64, types.float64, ir.DoubleType())


@_inline
def _bf16(address, shape):  # type: ignore[no-untyped-def]
    return carray(_pointer(address, np.uint16(0)), shape)


@_inline
def _f32(address, shape):  # type: ignore[no-untyped-def]
    return carray(_pointer(address, np.float32(0)), shape)


@_inline
def _i64(address, shape):  # type: ignore[no-untyped-def]
    return carray(_pointer(address, np.int64(0)), shape)


@_inline
def _up(h):  # type: ignore[no-untyped-def]
    """bf16 -> fp32."""
    return _as_float32(np.uint32(h) << np.uint32(16))


@_inline
def _down(f):  # type: ignore[no-untyped-def]
    """fp32 -> bf16, to nearest even. (A NaN whose payload is all in its low half is not one that arithmetic makes.)"""
    u = _as_uint32(f)
    return np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_inline
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x in fp32 to 2 ulp, 0 below -87, in operations that vectorize: 2^n times a polynomial on [-ln2/2, ln2/2]."""
    y = min(max(x, np.float32(-87.3)), np.float32(88.3))
    n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
    r = (y - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    e = _as_float32(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return p * e if x > np.float32(-87.3) or x != x else np.float32(0)


# ------------------------------------------------------------------------------------------------------------ row by row
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    x = _matrix(x)
    tasks, step = _split(x.shape[0], 4 * x.shape[1])
    _rms_norm(tasks, 2 * y.nbytes, step, *x.shape, x.stride(0), eps, x, weight, y)
    return y


@Kernel
def _rms_norm(a):  # type: ignore[no-untyped-def]
    step, rows, d, stride = a[2], a[3], a[4], a[5]
    eps, weight, y = np.float32(_as_float64(a[6])), _bf16(a[8], d), _bf16(a[9], (rows, d))
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            x, out = _bf16(a[7] + 2 * row * stride, d), y[row]
            s = np.float32(0)
            for i in range(d):
                v = _up(x[i])
                s += v * v
            r = np.float32(1) / np.sqrt(s / np.float32(d) + eps)
            for i in range(d):
                out[i] = _down(_up(_down(_up(x[i]) * r)) * _up(weight[i]))
        task = _next(a)


def rms_norm_dx(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx = r (g dy - xh mean(g dy xh)), xh = x r."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dy, x = _matrix(dy), _matrix(x)
    tasks, step = _split(x.shape[0], 6 * x.shape[1])
    _rms_norm_dx(tasks, 3 * dx.nbytes, step, *x.shape, dy.stride(0), x.stride(0), eps, dy, x, weight, dx)
    return dx


@Kernel
def _rms_norm_dx(a):  # type: ignore[no-untyped-def]
    step, rows, d = a[2], a[3], a[4]
    eps, weight, result = np.float32(_as_float64(a[7])), _bf16(a[10], d), _bf16(a[11], (rows, d))
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            dy, x, dx = _bf16(a[8] + 2 * row * a[5], d), _bf16(a[9] + 2 * row * a[6], d), result[row]
            square, inner = np.float32(0), np.float32(0)
            for i in range(d):
                v = _up(x[i])
                square += v * v
                inner += _up(dy[i]) * _up(weight[i]) * v
            r = np.float32(1) / np.sqrt(square / np.float32(d) + eps)
            mean = inner * r * r / np.float32(d)
            for i in range(d):
                dx[i] = _down(r * (_up(dy[i]) * _up(weight[i]) - _up(x[i]) * mean))
        task = _next(a)


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate each head of x [N, H*hd], or rotate it back; cos, sin [N, hd]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    x = _matrix(x)
    tasks, step = _split(x.shape[0], 4 * x.shape[1])
    _rope(tasks, 2 * y.nbytes, step, *x.shape, x.stride(0), cos.shape[1], -1.0 if back else 1.0, x, cos, sin, y)
    return y


@Kernel
def _rope(a):  # type: ignore[no-untyped-def]
    step, rows, width, stride, hd = a[2], a[3], a[4], a[5], a[6]
    sign, half = np.float32(_as_float64(a[7])), hd // 2
    cosines, sines, y = _bf16(a[9], (rows, hd)), _bf16(a[10], (rows, hd)), _bf16(a[11], (rows, width))
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            x, cos, sin = _bf16(a[8] + 2 * row * stride, width), cosines[row], sines[row]
            for head in range(0, width, hd):
                x1, x2, y1, y2 = x[head : head + half], x[head + half :], y[row, head : head + half], y[row, head + half :]
                for i in range(half):
                    u, v, c, s = _up(x1[i]), _up(x2[i]), _up(cos[i]), _up(sin[i]) * sign
                    y1[i], y2[i] = _down(u * c - v * s), _down(v * c + u * s)
        task = _next(a)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    y = torch.empty(g.shape, dtype=g.dtype)
    g, u = _matrix(g), _matrix(u)
    tasks, step = _split(g.shape[0], 6 * g.shape[1])
    _swiglu(tasks, 3 * y.nbytes, step, *g.shape, g.stride(0), u.stride(0), g, u, y)
    return y


@Kernel
def _swiglu(a):  # type: ignore[no-untyped-def]
    step, rows, width = a[2], a[3], a[4]
    y = _bf16(a[9], (rows, width))
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            g, u, out = _bf16(a[7] + 2 * row * a[5], width), _bf16(a[8] + 2 * row * a[6], width), y[row]
            for i in range(width):
                v = _up(g[i])
                out[i] = _down(v / (np.float32(1) + _exp(-v)) * _up(u[i]))
        task = _next(a)


def swiglu_backward(dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(dg, du), algorithms.md 4.2: the halves of one matrix, so that the gradient of their linear needs no copy."""
    rows, width = g.shape
    dm, g, u = _matrix(dm), _matrix(g), _matrix(u)
    both = torch.empty(rows, 2 * width, dtype=g.dtype)
    tasks, step = _split(rows, 10 * width)
    _swiglu_backward(tasks, 5 * dm.nbytes, step, rows, width, dm.stride(0), g.stride(0), u.stride(0), dm, g, u, both)
    return both[:, :width], both[:, width:]


@Kernel
def _swiglu_backward(a):  # type: ignore[no-untyped-def]
    step, rows, width = a[2], a[3], a[4]
    both = _bf16(a[11], (rows, 2, width))
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            dm, g, u = _bf16(a[8] + 2 * row * a[5], width), _bf16(a[9] + 2 * row * a[6], width), _bf16(a[10] + 2 * row * a[7], width)
            dg, du = both[row, 0], both[row, 1]
            for i in range(width):
                v, d = _up(g[i]), _up(dm[i])
                sigmoid = np.float32(1) / (np.float32(1) + _exp(-v))
                dg[i] = _down(d * _up(u[i]) * sigmoid * (np.float32(1) + v * (np.float32(1) - sigmoid)))
                du[i] = _down(d * v * sigmoid)
        task = _next(a)


# ------------------------------------------------------------------------------------------------------------- attention
def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See ReferenceKernels.decode_attention. Reads the pages where they are; a task is one KV head of one request."""
    (batch, heads, hd), (num_slots, kv_heads, _) = q.shape, k_cache.shape
    q, context = q.contiguous(), slots.stride(0)
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and slots.stride(1) == 1 and slots.shape[0] == batch
    o = torch.empty_like(q)
    group = heads // kv_heads
    tasks = batch * kv_heads
    scores = torch.empty(tasks, group, context)
    nbytes = 4 * tasks * context * hd  # K and V
    _decode_attention(tasks, nbytes, batch, kv_heads, group, hd, context, num_slots, scale, q, k_cache, v_cache, slots, lengths, scores, o)  # fmt: skip
    return o


@Kernel
def _decode_attention(a):  # type: ignore[no-untyped-def]
    hd = a[5]
    if hd == 64:  # constants, so that the loops over a head unroll
        _decode_heads(a, 64)
    elif hd == 128:
        _decode_heads(a, 128)
    else:
        _decode_heads(a, hd)


@_inline
def _decode_heads(a, hd):  # type: ignore[no-untyped-def]
    batch, kv_heads, group, context, num_slots = a[2], a[3], a[4], a[6], a[7]
    scale, tasks = np.float32(_as_float64(a[8])), a[1]
    queries, o = _bf16(a[9], (tasks, group, hd)), _bf16(a[15], (tasks, group, hd))
    keys, values = _bf16(a[10], (num_slots, kv_heads, hd)), _bf16(a[11], (num_slots, kv_heads, hd))
    slots, lengths, scratch = _i64(a[12], (batch, context)), _i64(a[13], batch), _f32(a[14], (tasks, group, context))
    q, sums = np.empty((group, hd), np.float32), np.empty((group, hd), np.float32)
    row = np.empty(hd, np.float32)
    task = _next(a)
    while task < tasks:
        owner, head = task // kv_heads, task % kv_heads
        n, seen = lengths[owner], slots[owner]
        for h in range(group):
            for i in range(hd):
                q[h, i] = _up(queries[task, h, i]) * scale
                sums[h, i] = np.float32(0)
        for c in range(n):
            k = keys[seen[c], head]
            for i in range(hd):
                row[i] = _up(k[i])
            for h in range(group):
                s = np.float32(0)
                for i in range(hd):
                    s += q[h, i] * row[i]
                scratch[task, h, c] = s
        for h in range(group):
            p = scratch[task, h]
            top, total = np.float32(-np.inf), np.float32(0)
            for c in range(n):
                top = max(top, p[c])
            for c in range(n):
                p[c] = _exp(p[c] - top)
                total += p[c]
            for c in range(n):
                p[c] /= total
        for c in range(n):
            v = values[seen[c], head]
            for i in range(hd):
                row[i] = _up(v[i])
            for h in range(group):
                w = scratch[task, h, c]
                for i in range(hd):
                    sums[h, i] += w * row[i]
        for h in range(group):
            for i in range(hd):
                o[task, h, i] = _down(sums[h, i])
        task = _next(a)
