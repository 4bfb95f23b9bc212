"""Predicted bytes of one training sequence at its fullest: what is stored, what is in flight, and what runs at that moment.

Saved activations dominate; the rest is what the emitted functions hold between their lines (counted when they were emitted) and
what kernels hold inside (which the kernels say). K/V pages are the pool's and are not counted; nor are the adapter and its
optimizer, which are there before the step and after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexllm.compiler.emit import Emitted, emit_forward
from flexllm.compiler.levels import JobCompiler, LevelPlan
from flexllm.ops.reference import ReferenceKernels


@dataclass(frozen=True)
class PeakBytes:
    """The fullest moment is one of three. `saved`: of all layers."""

    saved: int
    forward: int  # in the last layer's forward, all before it saved
    head: int  # in the loss head
    backward: int  # in the top layer's (or segment's) backward

    @property
    def total(self) -> int:
        return max(self.forward, self.head, self.backward)


def peak_bytes(job: JobCompiler, plan: LevelPlan, kernels: ReferenceKernels, tokens: int, window_rows: int, slice_rows: int) -> PeakBytes:
    """Of a sequence of `tokens`, its last window and its slices of so many rows; all rows have labels."""
    config, itemsize, program = job.config, job.itemsize, plan.program()
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    row = config.hidden_size * itemsize
    saved, gradient = plan.saved_bytes * tokens, row * tokens

    top = config.num_layers - 1
    compiler = job.compilers[job.kinds[-1]]
    forward = emit_forward(compiler.pruned, kernels, sorted(t.name for t in program.stored(top)))
    attention = kernels.attention_bytes(window_rows, tokens, *heads)
    live_forward = window_rows * row + _live(forward, window_rows * itemsize, attention)

    lowest = max(top - program.depth + 1, job.lowest_layer)
    attention = kernels.attention_backward_bytes(slice_rows, tokens, *heads)
    live_backward = _live(program.layer(top).emitted, slice_rows * itemsize, attention)
    if program.depth > 1:
        rebuilt = sum(program.layer(i).bytes_per_token(itemsize) for i in range(lowest, top + 1))
        live_backward += slice_rows * (rebuilt - (row if program.stored(lowest) else 0))  # the lowest one's input is the stored one
    if slice_rows < tokens:
        live_backward += tokens * (top - lowest + 1) * 2 * config.num_kv_heads * config.head_dim * max(4, itemsize)
    return PeakBytes(
        saved=saved,
        forward=saved + live_forward,
        head=saved + gradient + 2 * window_rows * row + kernels.head_bytes(window_rows, config.vocab_size, config.hidden_size, itemsize),
        backward=saved + gradient + live_backward,
    )


def _live(function: Emitted, column_bytes: int, attention: int) -> int:
    return max(function.live_columns * column_bytes, function.attention_columns * column_bytes + attention)
