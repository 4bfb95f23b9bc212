"""Weights in GGUF's blocks (ops/quantized.py): expanded in one pass, or, for few rows, while they are used."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from flexllm.ops.native.runtime import Kernel, arguments, down, half, inline, itemsize, matrix, next_task, numbers, split, u16, up, widen
from flexllm.ops.quantized import BLOCK, QuantizedWeight

HALF = BLOCK // 2
Q8_0, Q4_0, Q4_1 = 0, 1, 2
FORMATS = {"q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1}


def _weight(w: QuantizedWeight) -> tuple[int, Tensor, Tensor, Tensor]:
    """What `expand` takes of a weight; one without offsets has something else there, which is not read."""
    return FORMATS[w.format], w.codes, w.scales, w.scales if w.offsets is None else w.offsets


def _sixteen(value):
    """Sixteen codes at an address times a scale plus an offset, to fp32 at another. Written out in vectors because of the two
    addresses: a compiler that cannot know them apart takes the codes one by one. `value`: the codes of a vector of bytes."""

    @intrinsic
    def expand_16(typingctx, codes, out, scale, offset):
        def codegen(context, builder, signature, args):
            floats = ir.VectorType(ir.FloatType(), 16)

            def everywhere(x):
                first = builder.insert_element(ir.Constant(floats, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))

            octets = builder.load(builder.inttoptr(args[0], ir.VectorType(ir.IntType(8), 16).as_pointer()), align=1)
            scaled = builder.fmul(value(builder, octets, floats), everywhere(args[2]))
            result = builder.fadd(scaled, everywhere(args[3]))
            builder.store(result, builder.inttoptr(args[1], floats.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.float32), codegen

    return expand_16


def _bytes(number):
    return ir.Constant(ir.VectorType(ir.IntType(8), 16), [number] * 16)


_signed = _sixteen(lambda builder, octets, floats: builder.sitofp(octets, floats))
_low = _sixteen(lambda builder, octets, floats: builder.uitofp(builder.and_(octets, _bytes(15)), floats))
_high = _sixteen(lambda builder, octets, floats: builder.uitofp(builder.lshr(octets, _bytes(4)), floats))


@inline
def expand(format, codes, scales, offsets, row, blocks, values):
    """A row of a weight into fp32 values. Codes times scales are exact in fp32, so only an offset rounds."""
    for block in range(row * blocks, row * blocks + blocks):
        scale = half(u16(scales + 2 * block, 1)[0])
        if format == Q8_0:
            _signed(codes + BLOCK * block, values, scale, np.float32(0))
            _signed(codes + BLOCK * block + HALF, values + 4 * HALF, scale, np.float32(0))
        else:
            offset = half(u16(offsets + 2 * block, 1)[0]) if format == Q4_1 else np.float32(-8) * scale
            _low(codes + HALF * block, values, scale, offset)
            _high(codes + HALF * block, values + 4 * HALF, scale, offset)
        values += 4 * BLOCK


def dequantize(w: QuantizedWeight) -> Tensor:
    """[out, in], rounded once."""
    y = torch.empty(w.shape, dtype=w.dtype)
    tasks, step = split(w.shape[0], 3 * w.shape[1])
    _dequantize[y.dtype](tasks, y.nbytes, step, *w.scales.shape, *_weight(w), y)
    return y


@Kernel
def _dequantize(memory):
    a = arguments(memory)
    step, rows, blocks = a[2], a[3], a[4]
    values, y = np.empty(BLOCK * blocks, np.float32), numbers(memory, a[9], (rows, BLOCK * blocks))
    task = next_task(a)
    while task < a[1]:
        for row in range(task * step, min(rows, task * step + step)):
            expand(a[5], a[6], a[7], a[8], row, blocks, values.ctypes.data)
            for i in range(BLOCK * blocks):
                y[row, i] = down(memory, values[i])
        task = next_task(a)


def linear(x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [N, in] w^T + bias [N, out] for few rows: the weight is read once, as the blocks it is stored in."""
    x = matrix(x)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    tasks, step = split(w.shape[0], 2 * w.shape[1])
    optional = (0, y) if bias is None else (1, bias)
    _linear[x.dtype](tasks, w.nbytes, step, *w.scales.shape, *_weight(w), x.shape[0], x.stride(0), x, *optional, y)
    return y


@Kernel
def _linear(memory):
    a, size = arguments(memory), itemsize(memory)
    step, outs, blocks, rows, biased = a[2], a[3], a[4], a[9], a[12]
    width = BLOCK * blocks
    values, x = np.empty(width, np.float32), np.empty((rows, width), np.float32)
    bias, y = numbers(memory, a[13], outs), numbers(memory, a[14], (rows, outs))
    for r in range(rows):
        widen(numbers(memory, a[11] + size * r * a[10], width), x[r])
    task = next_task(a)
    while task < a[1]:
        for out in range(task * step, min(outs, task * step + step)):
            expand(a[5], a[6], a[7], a[8], out, blocks, values.ctypes.data)
            start = up(bias[out]) if biased else np.float32(0)
            fours = rows // 4 * 4
            for r in range(0, fours, 4):  # every value that is loaded is used four times
                s0 = s1 = s2 = s3 = np.float32(0)
                for i in range(width):
                    v = values[i]
                    s0 += x[r, i] * v
                    s1 += x[r + 1, i] * v
                    s2 += x[r + 2, i] * v
                    s3 += x[r + 3, i] * v
                y[r, out], y[r + 1, out] = down(memory, start + s0), down(memory, start + s1)
                y[r + 2, out], y[r + 3, out] = down(memory, start + s2), down(memory, start + s3)
            for r in range(fours, rows):
                s = np.float32(0)
                for i in range(width):
                    s += x[r, i] * values[i]
                y[r, out] = down(memory, start + s)
        task = next_task(a)
