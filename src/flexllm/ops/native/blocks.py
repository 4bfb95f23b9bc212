"""fp32 matrix products in blocks that stay in registers, and the layouts that they want."""

from __future__ import annotations

import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from flexllm.ops.native.runtime import FAST

AVX512 = binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if AVX512 else 8  # fp32 numbers of a vector
ROWS, VECTORS = 4, 4 if AVX512 else 2  # a block of a product that stays in registers, of which there are 32 or 16
PANEL = VECTORS * LANES


def rows_of(x: Tensor) -> Tensor:
    """[n, H, hd] -> fp32 [H, n, hd] with hd padded to whole vectors and n to whole panels by zeros."""
    n, heads, hd = x.shape
    y = torch.zeros(heads, -(-n // PANEL) * PANEL, -(-hd // LANES) * LANES)
    y[:, :n, :hd] = x.transpose(0, 1)
    return y


def panels_of(rows: Tensor) -> Tensor:
    """rows_of's [H, n, hd] -> [H, n / PANEL, hd, PANEL]: transposed, in panels that are contiguous, as the cache likes them."""
    return rows.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous()


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


@njit(**FAST)
def product(a, a_row, a_step, b, b_row, b_panel, c, c_row, rows, steps, columns, add):
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
