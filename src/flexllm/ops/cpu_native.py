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
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

AHEAD = 8  # positions whose K and V are asked for before they are read: pages are scattered, and the hardware does not guess them
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
def _next(typingctx, a):
    """The next task of the team's."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def _pointer(typingctx, address, like):
    """An address as a pointer to values of `like`'s type."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), codegen


def _bitcast(source, target, llvm):
    @intrinsic
    def cast(typingctx, value):
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], llvm)

    return cast


_as_float32 = _bitcast(types.uint32, types.float32, ir.FloatType())
_as_uint32 = _bitcast(types.float32, types.uint32, ir.IntType(32))
_as_float64 = _bitcast(types.int64, types.float64, ir.DoubleType())


@intrinsic
def _prefetch(typingctx, address):
    """Ask for the cache line at an address, which need not be a valid one."""

    def codegen(context, builder, signature, args):
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@_inline
def _bf16(address, shape):
    return carray(_pointer(address, np.uint16(0)), shape)


@_inline
def _f32(address, shape):
    return carray(_pointer(address, np.float32(0)), shape)


@_inline
def _i64(address, shape):
    return carray(_pointer(address, np.int64(0)), shape)


@_inline
def _up(h):
    """bf16 -> fp32."""
    return _as_float32(np.uint32(h) << np.uint32(16))


@_inline
def _down(f):
    """fp32 -> bf16, to nearest even. (A NaN whose payload is all in its low half is not one that arithmetic makes.)"""
    u = _as_uint32(f)
    return np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_inline
def _exp(x):
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


@_inline
def _whole(n, unit):
    return (n + unit - 1) // unit * unit


@njit(cache=True, fastmath={"nnan", "nsz"})
def _largest(p, n):
    """The largest of p[:n]; where one is a NaN any of them (the sum of exponentials is a NaN then, and all that follows)."""
    top = np.float32(-np.inf)
    for c in range(n):
        top = max(top, p[c])
    return top


@_inline
def _softmax(p, n):
    """p[:n] becomes its softmax; returns its logsumexp."""
    top, total = _largest(p, n), np.float32(0)
    for c in range(n):
        p[c] = _exp(p[c] - top)
        total += p[c]
    inverse = np.float32(1) / total
    for c in range(n):
        p[c] *= inverse
    return top + np.log(total)


# ------------------------------------------------------------------------------------------------------------ row by row
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    x = _matrix(x)
    tasks, step = _split(x.shape[0], 4 * x.shape[1])
    _rms_norm(tasks, 2 * y.nbytes, step, *x.shape, x.stride(0), eps, x, weight, y)
    return y


@Kernel
def _rms_norm(a):
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
def _rms_norm_dx(a):
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
def _rope(a):
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
def _swiglu(a):
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
def _swiglu_backward(a):
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
    _decode_attention(
        batch * parts, nbytes, batch, kv_heads, heads // kv_heads, hd, context, num_slots, scale,
        q, k_cache, v_cache, slots, lengths, scores, o,
    )  # fmt: skip
    return o


@Kernel
def _decode_attention(a):
    hd = a[5]
    if hd == 64:  # constants, so that the loops over a head unroll
        _decode_heads(a, 64)
    elif hd == 128:
        _decode_heads(a, 128)
    else:
        _decode_heads(a, hd)


@_inline
def _decode_heads(a, hd):
    batch, kv_heads, group, context, num_slots = a[2], a[3], a[4], a[6], a[7]
    scale, tasks = np.float32(_as_float64(a[8])), a[1]
    heads, parts = kv_heads * group, tasks // batch
    own = kv_heads // parts  # KV heads of a task
    queries, o = _bf16(a[9], (batch, heads, hd)), _bf16(a[15], (batch, heads, hd))
    keys, values = _bf16(a[10], (num_slots, kv_heads, hd)), _bf16(a[11], (num_slots, kv_heads, hd))
    slots, lengths, scratch = _i64(a[12], (batch, context)), _i64(a[13], batch), _f32(a[14], (batch, heads, context))
    q, sums = np.empty((heads, hd), np.float32), np.empty((heads, hd), np.float32)
    row, other = np.empty(hd, np.float32), np.empty(hd, np.float32)
    task = _next(a)
    while task < tasks:
        owner, first = task // parts, task % parts * own
        n, seen, p = lengths[owner], slots[owner], scratch[owner]
        for h in range(first * group, (first + own) * group):
            for i in range(hd):
                q[h, i] = _up(queries[owner, h, i]) * scale
                sums[h, i] = np.float32(0)
        for c in range(n):
            ahead = a[10] + 2 * (seen[min(c + AHEAD, n - 1)] * kv_heads + first) * hd
            for line in range(0, 2 * own * hd, 64):
                _prefetch(ahead + line)
            for kv in range(first, first + own):
                k = keys[seen[c], kv]
                for i in range(hd):
                    row[i] = _up(k[i])
                for h in range(kv * group, (kv + 1) * group):
                    s = np.float32(0)
                    for i in range(hd):
                        s += q[h, i] * row[i]
                    p[h, c] = s
        for h in range(first * group, (first + own) * group):
            _softmax(p[h], n)
        for c in range(0, n - 1, 2):  # two positions at a time: half the traffic to the sums
            for step in range(2):
                ahead = a[11] + 2 * (seen[min(c + step + AHEAD, n - 1)] * kv_heads + first) * hd
                for line in range(0, 2 * own * hd, 64):
                    _prefetch(ahead + line)
            for kv in range(first, first + own):
                v, w = values[seen[c], kv], values[seen[c + 1], kv]
                for i in range(hd):
                    row[i], other[i] = _up(v[i]), _up(w[i])
                for h in range(kv * group, (kv + 1) * group):
                    x, y = p[h, c], p[h, c + 1]
                    for i in range(hd):
                        sums[h, i] += x * row[i] + y * other[i]
        for kv in range(first, first + own):
            v = values[seen[n - 1], kv]
            for h in range(kv * group, (kv + 1) * group):
                x = p[h, n - 1] if n % 2 else np.float32(0)
                for i in range(hd):
                    o[owner, h, i] = _down(sums[h, i] + x * _up(v[i]))
        task = _next(a)


TILE = 32  # query rows of a task
LANES = 16  # fp32 numbers of a vector
ROWS, VECTORS = 4, 4  # a block of a product that stays in registers: 4 rows of 4 vectors
PANEL = VECTORS * LANES


def window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ReferenceKernels.window_attention; any type up to fp32. Products are fp32, exact to the diagonal but for half a block."""
    (s, heads, hd), (b, kv_heads, _) = q.shape, k.shape
    keys, values = _panels(k), _rows(v)
    queries = _rows(q * scale if q.dtype == torch.float32 else q.float().mul_(scale))
    o, lse = torch.empty(s, heads, hd), torch.empty(s, heads)
    tiles = -(-s // TILE)
    _window_attention(tiles * heads, 4 * keys.nbytes, s, b, heads, kv_heads, hd, *values.shape[1:], queries, keys, values, o, lse)
    return o.to(q.dtype), lse


def _rows(x: Tensor) -> Tensor:
    """[n, H, hd] -> fp32 [H, n, hd] with hd padded to whole vectors and n to whole panels by zeros."""
    n, heads, hd = x.shape
    y = torch.zeros(heads, -(-n // PANEL) * PANEL, -(-hd // LANES) * LANES)
    y[:, :n, :hd] = x.transpose(0, 1)
    return y


def _panels(x: Tensor) -> Tensor:
    """[n, H, hd] -> fp32 [H, n / PANEL, hd, PANEL], padded as by _rows: x^T in panels that are contiguous, as the cache likes them."""
    y = _rows(x)
    return y.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous()


def _block(count):
    """c [ROWS, count * LANES] (+)= a [ROWS, steps] b [steps, count * LANES], accumulated in registers.

    a, b, c: addresses of fp32 numbers; a_row .. c_row: strides in numbers (a's steps are a_step apart); add: into c, or c anew.
    """
    i64, i32, vector = ir.IntType(64), ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
    undefined, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
    cells = [(r, v) for r in range(ROWS) for v in range(count)]

    def number(n):
        return ir.Constant(i64, n)

    def codegen(context, builder, signature, args):
        a, a_row, a_step, b, b_row, c, c_row, steps, add = args
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32")

        def at(base, row, row_stride, column, kind):
            offset = builder.add(builder.mul(row, row_stride), column)
            return builder.inttoptr(builder.add(base, builder.mul(offset, number(4))), kind.as_pointer())

        where = {(r, v): at(c, number(r), c_row, number(v * LANES), vector) for r, v in cells}
        before, loop, done = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        step, sums = builder.phi(i64), {cell: builder.phi(vector) for cell in cells}
        row = [builder.load(at(b, step, b_row, number(v * LANES), vector), align=4) for v in range(count)]
        total = {}
        for r in range(ROWS):
            value = builder.load(at(a, step, a_step, builder.mul(number(r), a_row), ir.FloatType()))
            spread = builder.shuffle_vector(builder.insert_element(undefined, value, ir.Constant(i32, 0)), undefined, first)
            for v in range(count):
                total[r, v] = builder.call(fma, [spread, row[v], sums[r, v]])
        following = builder.add(step, number(1))
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
        step.add_incoming(number(0), before)
        step.add_incoming(following, loop)
        for cell in cells:
            sums[cell].add_incoming(ir.Constant(vector, [0.0] * LANES), before)
            sums[cell].add_incoming(total[cell], loop)

        builder.position_at_end(done)
        with builder.if_else(builder.icmp_signed("!=", add, number(0))) as (into, anew):
            with into:
                for cell in cells:
                    builder.store(builder.fadd(builder.load(where[cell], align=4), total[cell]), where[cell], align=4)
            with anew:
                for cell in cells:
                    builder.store(total[cell], where[cell], align=4)
        return context.get_dummy_value()

    @intrinsic
    def block(typingctx, a, a_row, a_step, b, b_row, c, c_row, steps, add):
        return types.void(*(types.int64,) * 9), codegen

    return block


_wide_block, _narrow_block = _block(VECTORS), _block(1)


@njit(**_FAST)
def _product(a, a_row, a_step, b, b_row, b_panel, c, c_row, rows, steps, columns, add):
    """c [rows, columns] (+)= a [rows, steps] b [steps, columns]; rows in whole ROWS, columns in whole LANES.

    Strides in numbers; b's panels of PANEL columns are b_panel apart.
    """
    for panel in range(columns // PANEL):
        for i in range(0, rows, ROWS):
            at = c + 4 * (i * c_row + panel * PANEL)
            _wide_block(a + 4 * i * a_row, a_row, a_step, b + 4 * panel * b_panel, b_row, at, c_row, steps, add)
    last = columns // PANEL
    for j in range(0, columns - last * PANEL, LANES):
        for i in range(0, rows, ROWS):
            at = c + 4 * (i * c_row + last * PANEL + j)
            _narrow_block(a + 4 * i * a_row, a_row, a_step, b + 4 * (last * b_panel + j), b_row, at, c_row, steps, add)


# ---------------------------------------------------------------------------------------------------- low-rank products
def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """x [N, in] w^T for a small w [R, in]."""
    x, w = _matrix(x), w.contiguous()
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    tasks, step = _row_blocks(x.shape[0])
    _matmul_nt(tasks, x.nbytes, step, *x.shape, w.shape[0], x.stride(0), x, w, y)
    return y


def _row_blocks(rows: int) -> tuple[int, int]:
    """(tasks, rows of a task): whole ROWS, and a few tasks for each thread."""
    step = min(32, -(-rows // (4 * ROWS)) * ROWS)
    return -(-rows // step), step


@Kernel
def _matmul_nt(a):
    step, rows, width, rank, stride = a[2], a[3], a[4], a[5], a[6]
    packed, y = _bf16(a[8], (rank, width)), _bf16(a[9], (rows, rank))
    w, x = np.zeros((_whole(rank, 2), width), np.float32), np.zeros((ROWS, width), np.float32)
    for k in range(rank):
        for i in range(width):
            w[k, i] = _up(packed[k, i])
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step), ROWS):
            count = min(ROWS, rows - row)
            for r in range(count):
                source = _bf16(a[7] + 2 * (row + r) * stride, width)
                for i in range(width):
                    x[r, i] = _up(source[i])
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
                        y[row + r, k] = _down(s)
                        if k + 1 < rank:
                            y[row + r, k + 1] = _down(t)
        task = _next(a)


def add_matmul_nn_(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """y + x w into y [N, out], a column slice perhaps, for a small w [R, out]; rounded once."""
    x, w = x.contiguous(), w.contiguous()
    assert y.stride(1) == 1, y.stride()
    tasks, step = _row_blocks(y.shape[0])
    _add_matmul_nn(tasks, 2 * y.nbytes, step, *y.shape, w.shape[0], y.stride(0), x, w, y)
    return y


@Kernel
def _add_matmul_nn(a):
    step, rows, width, rank, stride = a[2], a[3], a[4], a[5], a[6]
    left, packed, padded = _bf16(a[7], (rows, rank)), _bf16(a[8], (rank, width)), _whole(width, LANES)
    w, x, sums = np.zeros((rank, padded), np.float32), np.zeros((ROWS, rank), np.float32), np.zeros((ROWS, padded), np.float32)
    for k in range(rank):
        for i in range(width):
            w[k, i] = _up(packed[k, i])
    w_at, x_at, sums_at = w.ctypes.data, x.ctypes.data, sums.ctypes.data
    task = _next(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step), ROWS):
            count = min(ROWS, rows - row)
            for r in range(count):
                y = _bf16(a[9] + 2 * (row + r) * stride, width)
                for i in range(width):
                    sums[r, i] = _up(y[i])
                for k in range(rank):
                    x[r, k] = _up(left[row + r, k])
            _product(x_at, rank, 1, w_at, padded, PANEL, sums_at, padded, ROWS, rank, padded, 1)
            for r in range(count):
                y = _bf16(a[9] + 2 * (row + r) * stride, width)
                for i in range(width):
                    y[i] = _down(sums[r, i])
        task = _next(a)


@Kernel
def _window_attention(a):
    s, b, heads, kv_heads, hd, columns, width = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    group = heads // kv_heads
    padded = _whole(s, PANEL)
    o, lse = _f32(a[12], (s, heads, hd)), _f32(a[13], (s, heads))
    pitch = columns + LANES  # not a power of two: rows in different cache sets
    scores, sums = np.empty((TILE, pitch), np.float32), np.empty((TILE, width), np.float32)
    p_at, sums_at = scores.ctypes.data, sums.ctypes.data
    task = _next(a)
    while task < a[1]:
        head, first = task % heads, (a[1] // heads - 1 - task // heads) * TILE  # long tiles first
        rows = min(TILE, s - first)
        whole = _whole(rows, ROWS)
        n = b - s + first + rows
        q_at = a[9] + 4 * (head * padded + first) * width
        k_at, v_at = a[10] + 4 * (head // group) * width * columns, a[11] + 4 * (head // group) * width * columns
        _product(q_at, width, 1, k_at, PANEL, width * PANEL, p_at, pitch, whole, width, _whole(n, PANEL), 0)
        for r in range(whole):
            p = scores[r]
            for c in range(b - s + first + r + 1, _whole(n, PANEL)):
                p[c] = np.float32(-np.inf)
            logsumexp = _softmax(p, _whole(n, PANEL))
            if r < rows:
                lse[first + r, head] = logsumexp
        _product(p_at, pitch, 1, v_at, width, PANEL, sums_at, width, whole, n, width, 0)
        for r in range(rows):
            for i in range(hd):
                o[first + r, head, i] = sums[r, i]
        task = _next(a)


def window_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ReferenceKernels.window_attention_backward (algorithms.md 2.1); delta = sum(P dP), which needs no output."""
    (s, heads, hd), (b, kv_heads, _) = q.shape, k.shape
    queries = _rows(q * scale if q.dtype == torch.float32 else q.float().mul_(scale))
    key_rows = _rows(k)
    keys, values = key_rows.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous(), _panels(v)
    columns, width = key_rows.shape[1:]
    teams = torch.get_num_threads()
    dq, dkv = torch.empty(s, heads, hd), torch.zeros(teams, 2, kv_heads, columns, width)
    tiles, member = -(-s // TILE), torch.zeros(1, dtype=torch.int64)
    _window_attention_backward(
        tiles * heads, 10 * keys.nbytes, s, b, heads, kv_heads, hd, columns, width, scale,
        queries, keys, key_rows, values, _rows(do), lse.contiguous(), dq, dkv, member,
    )  # fmt: skip
    dk, dv = (dkv.sum(0) if teams > 1 else dkv[0])[:, :, :b, :hd].transpose(1, 2)
    return dq.to(q.dtype), dk, dv


@Kernel
def _window_attention_backward(a):
    s, b, heads, kv_heads, hd, columns, width, scale = a[2], a[3], a[4], a[5], a[6], a[7], a[8], np.float32(_as_float64(a[9]))
    group, padded, pitch = heads // kv_heads, _whole(s, PANEL), columns + LANES
    lse, dq = _f32(a[15], (s, heads)), _f32(a[16], (s, heads, hd))
    member = _next(_pointer(a[18], np.int64(0)))  # each thread sums dK and dV apart
    head_bytes = 4 * columns * width
    probabilities, gradients = np.empty((TILE, pitch), np.float32), np.empty((TILE, pitch), np.float32)
    sums = np.empty((TILE, width), np.float32)
    p_at, ds_at, sums_at = probabilities.ctypes.data, gradients.ctypes.data, sums.ctypes.data
    task = _next(a)
    while task < a[1]:
        head, first = task % heads, (a[1] // heads - 1 - task // heads) * TILE  # long tiles first
        rows, kv = min(TILE, s - first), head // group
        whole, n = _whole(rows, ROWS), b - s + first + rows
        wide = _whole(n, PANEL)
        q_at, do_at = a[10] + 4 * (head * padded + first) * width, a[14] + 4 * (head * padded + first) * width
        dk_at = a[17] + (member * 2 * kv_heads + kv) * head_bytes
        dv_at = dk_at + kv_heads * head_bytes
        _product(q_at, width, 1, a[11] + kv * head_bytes, PANEL, width * PANEL, p_at, pitch, whole, width, wide, 0)  # S
        _product(do_at, width, 1, a[13] + kv * head_bytes, PANEL, width * PANEL, ds_at, pitch, whole, width, wide, 0)  # dP
        for r in range(whole):
            p, ds = probabilities[r], gradients[r]
            seen = b - s + first + r + 1 if r < rows else 0
            for c in range(seen, wide):
                p[c] = np.float32(-np.inf)
            norm, delta = lse[first + r, head] if r < rows else np.float32(0), np.float32(0)
            for c in range(wide):
                p[c] = _exp(p[c] - norm)
                delta += p[c] * ds[c]
            for c in range(wide):
                ds[c] = p[c] * (ds[c] - delta)
        _product(ds_at, pitch, 1, a[12] + kv * head_bytes, width, PANEL, sums_at, width, whole, n, width, 0)  # dQ = dS K
        _product(ds_at, 1, pitch, q_at, width, PANEL, dk_at, width, _whole(n, ROWS), whole, width, 1)  # dK += dS^T Q
        _product(p_at, 1, pitch, do_at, width, PANEL, dv_at, width, _whole(n, ROWS), whole, width, 1)  # dV += P^T dO
        for r in range(rows):
            for i in range(hd):
                dq[first + r, head, i] = sums[r, i] * scale
        task = _next(a)
