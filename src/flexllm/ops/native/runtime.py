"""Python loops compiled by numba and run by torch's own OpenMP threads, and what the loops are written with.

A second thread pool beside torch's would fight it for the cores, so a kernel is a C function that GOMP_parallel, of the libgomp that
torch has loaded, runs on every thread; each takes the next task from a shared counter, so that a thread which loses its core does not
hold up the others. A kernel's argument is an array of int64: the next task, the number of tasks, then sizes, float64 bits and pointers
in the order of the call. Numbers are bf16 (seen as uint16) or fp32 in memory and fp32 in registers: rounded once, at the end.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from flexllm.config import cache_dir

IN_MEMORY = {torch.bfloat16: types.uint16, torch.float32: types.float32}
SERIAL_BYTES = 2**15  # below this, waking the other threads costs more than they bring

# Sums may be reordered and fused (vectors of partial sums); NaN and infinity keep their meaning.
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
inline = njit(inline="always", **FAST)


# ------------------------------------------------------------------------------------------------------------- from Python
class Kernel:
    """A function of one argument array, run over tasks 0..tasks-1 and compiled for each type of the numbers in memory that it is called
    with: `kernel[x.dtype](...)`. Its only parameter, `memory`, points to the arguments and is typed as if they were such numbers."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self._compiled: dict[torch.dtype, _Compiled] = {}

    def __getitem__(self, dtype: torch.dtype) -> _Compiled:
        """At the first call: seconds, once per machine; later processes read it from the disk."""
        if dtype not in self._compiled:
            folder, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_cache_folder())
            try:
                signature = types.void(types.CPointer(IN_MEMORY[dtype]))
                self._compiled[dtype] = _Compiled(cfunc(signature, cache=True, **FAST)(self._body))
            finally:
                numba.config.CACHE_DIR = folder
        return self._compiled[dtype]


class _Compiled:
    def __init__(self, function: Any) -> None:
        self._function = function  # lives as long as its code
        self._address = function.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._address)

    def __call__(self, tasks: int, nbytes: int, *args: Tensor | int | float) -> None:
        """`nbytes`: what it reads and writes, roughly: a little is not worth waking the other threads for."""
        # Fresh bytes that nobody else sees: the kernel may count in them.
        packed = struct.pack(f"{2 + len(args)}q", 0, tasks, *[a.data_ptr() if isinstance(a, Tensor) else _bits(a) for a in args])
        threads = torch.get_num_threads()
        if threads == 1 or tasks == 1 or nbytes < SERIAL_BYTES or _team is None:
            self._alone(packed)
        else:
            _team(self._address, packed, threads, 0)


@cache
def _cache_folder() -> Path:
    """Of these sources: numba's own cache notices a change of a kernel's file, not of what the kernel calls."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))
    return cache_dir() / "kernels" / digest.hexdigest()[:16]


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


def split(rows: int, row_bytes: int) -> tuple[int, int]:
    """(tasks, rows of a task): tasks large enough to be worth taking."""
    step = max(1, min(-(-rows // 2), SERIAL_BYTES // row_bytes))
    return -(-rows // step), step


def matrix(x: Tensor) -> Tensor:
    """x [..., d] as rows whose columns are adjacent; the rows may be apart by any stride."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()


# --------------------------------------------------------------------------------------------------------- from the kernels
@intrinsic
def next_task(typingctx, a):
    """The next task of the team's."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def pointer(typingctx, address, like):
    """An address, or a pointer, as a pointer to values of `like`'s type; if `like` is a pointer, to values such as it points to."""
    kind = like if isinstance(like, types.CPointer) else types.CPointer(like)
    is_pointer = isinstance(address, types.CPointer)

    def codegen(context, builder, signature, args):
        convert = builder.bitcast if is_pointer else builder.inttoptr
        return convert(args[0], context.get_value_type(kind))

    return kind(address if is_pointer else types.int64, like), codegen


def _bitcast(source, target, llvm):
    @intrinsic
    def cast(typingctx, value):
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], llvm)

    return cast


as_float32 = _bitcast(types.uint32, types.float32, ir.FloatType())
as_uint32 = _bitcast(types.float32, types.uint32, ir.IntType(32))
as_float64 = _bitcast(types.int64, types.float64, ir.DoubleType())


@intrinsic
def _prefetch_line(typingctx, address):
    """Ask for the cache line at an address, which need not be a valid one."""

    def codegen(context, builder, signature, args):
        address, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], address), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inline
def prefetch(address, nbytes):
    """Ask for the cache lines of `nbytes` at an address."""
    for line in range(0, nbytes, 64):
        _prefetch_line(address + line)


@intrinsic
def itemsize(typingctx, memory):
    """Bytes of a number in memory."""
    size = memory.dtype.bitwidth // 8
    return types.int64(memory), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), size)


@inline
def arguments(memory):
    """A kernel's arguments as they are."""
    return pointer(memory, np.int64(0))


@inline
def numbers(memory, address, shape):
    """An array of bf16 or fp32."""
    return carray(pointer(address, memory), shape)


@inline
def u16(address, shape):
    return carray(pointer(address, np.uint16(0)), shape)


@inline
def f32(address, shape):
    return carray(pointer(address, np.float32(0)), shape)


@inline
def i64(address, shape):
    return carray(pointer(address, np.int64(0)), shape)


@inline
def half(h):
    """fp16, as bits -> fp32: shifted, it is its value times 2^-112. (No infinities and NaNs.)"""
    magnitude = as_float32((np.uint32(h) & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    return as_float32(as_uint32(magnitude) | (np.uint32(h) & np.uint32(0x8000)) << np.uint32(16))


def up(number):
    """A number from memory -> fp32."""


@overload(up, inline="always")
def _up(number):
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: as_float32(np.uint32(number) << np.uint32(16))


def down(memory, f):
    """fp32 -> a number for memory; bf16 to nearest even. (A NaN whose payload is all in its low half is not one that arithmetic makes.)"""


@overload(down, inline="always")
def _down(memory, f):
    if isinstance(memory.dtype, types.Float):
        return lambda memory, f: f

    def nearest_even(memory, f):
        u = as_uint32(f)
        return np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return nearest_even


@inline
def widen(h, f):
    """Numbers h from memory into fp32 f."""
    for i in range(h.shape[0]):
        f[i] = up(h[i])


@inline
def exp(x):
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
    e = as_float32(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return p * e if x > np.float32(-87.3) or x != x else np.float32(0)


@inline
def whole_units(n, unit):
    return (n + unit - 1) // unit * unit


@njit(fastmath={"nnan", "nsz"})
def largest(p, n):
    """The largest of p[:n]; where one is a NaN any of them (the sum of exponentials is a NaN then, and all that follows)."""
    top = np.float32(-np.inf)
    for c in range(n):
        top = max(top, p[c])
    return top


@inline
def softmax(p, n):
    """p[:n] becomes its softmax; returns its logsumexp."""
    top, total = largest(p, n), np.float32(0)
    for c in range(n):
        p[c] = exp(p[c] - top)
        total += p[c]
    inverse = np.float32(1) / total
    for c in range(n):
        p[c] *= inverse
    return top + np.log(total)
