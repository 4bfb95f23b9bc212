"""Operators: the leaves of the compiler's graph. Each is declared once.

A declaration says which kernel runs it, its gradient as operators over (arguments, outputs, output gradients), how many
columns its result has, what a row of it costs, and how it
shards. Nothing differentiates by hand: a function written in operators is differentiated by compiler/autodiff.py.

Calling an operator on `torch.fx` proxies appends a node to their graph. The kernels (reference.py, cpu.py, cuda.py) run
only inside the functions that compiler/emit.py writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node, Proxy

Gradient = Callable[[], Proxy] | None  # builds the gradient of one argument; None: it has none
Backward = Callable[[Sequence[Any], Any, Any], tuple[Gradient, ...]]  # (args, outputs, output gradients)


def columns(value: Any) -> int:
    """Elements per row of a value in the graph (for a weight or a parameter: its two sizes are in meta["shape"])."""
    return value.node.meta["columns"]


def shape(value: Any) -> tuple[int, int]:
    """(rows, columns) of a weight or a parameter."""
    return value.node.meta["shape"]


@dataclass(frozen=True, eq=False)
class Operator:
    """`columns(*args)` gives the result's columns (a tuple for several results); `flops(*args)` per row, forward.

    `pair_flops(*args)`: per row and visible key, on top (attention).
    `row_local`: row i of the result depends on row i of the arguments alone (attention is the exception).
    `shard`: how the result follows from sharded arguments: `same` (elementwise), `column` / `row` (by the weight's own
    sharding), `head` (whole heads per rank), `reduce` (a sum over ranks is pending).
    """

    name: str
    columns: Callable[..., int | tuple[int, ...]]
    backward: Backward | None = None
    flops: Callable[..., float] = field(default=lambda *_: 0.0)
    pair_flops: Callable[..., float] = field(default=lambda *_: 0.0)
    row_local: bool = True
    shard: str = "same"
    context: bool = False  # runs on the layer's context (cache, accumulators) instead of the kernels
    fp32_outputs: tuple[int, ...] = ()  # results kept in fp32 whatever the model's type
    bits: int | None = None  # of an element of the result, packed along the row; None: the model's type

    @property
    def __name__(self) -> str:  # torch.fx names nodes after it
        return self.name

    def __call__(self, *args: Any) -> Any:
        tracer = next(a for a in args if isinstance(a, Proxy)).tracer
        out = tracer.create_proxy("call_function", self, args, {})
        cols = self.columns(*args)
        out.node.meta.update(columns=cols, flops=self.flops(*args), pair_flops=self.pair_flops(*args))
        if self.bits is not None:
            out.node.meta["bits"] = self.bits
        if not isinstance(cols, tuple):
            return out
        results = tuple(out[i] for i in range(len(cols)))  # type: ignore[index]
        for i, (result, c) in enumerate(zip(results, cols, strict=True)):
            result.node.meta.update(columns=c, fp32=i in self.fp32_outputs)
        return results


def is_operator(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, Operator)


# ------------------------------------------------------------------------------------------------------- linear algebra
linear: Operator = Operator(
    "linear",  # (x, w, bias): a frozen base GEMM
    columns=lambda x, w, b: shape(w)[0],
    backward=lambda a, out, g: (lambda: linear_dx(g, a[1]), lambda: matmul_tn(g, a[0]), None),
    flops=lambda x, w, b: 2.0 * shape(w)[0] * shape(w)[1],
    shard="column",
)
linear_dx: Operator = Operator(
    "linear_dx",  # (dy, w)
    columns=lambda g, w: shape(w)[1],
    flops=lambda g, w: 2.0 * shape(w)[0] * shape(w)[1],
    shard="row",
)
matmul_nt: Operator = Operator(
    "matmul_nt",  # (x, w): x w^T with a small trainable w
    columns=lambda x, w: shape(w)[0],
    backward=lambda a, out, g: (lambda: matmul_nn(g, a[1]), lambda: matmul_tn(g, a[0])),
    flops=lambda x, w: 2.0 * shape(w)[0] * shape(w)[1],
    shard="column",
)
matmul_nn: Operator = Operator(
    "matmul_nn",  # (x, w): x w with a small trainable w
    columns=lambda x, w: shape(w)[1],
    backward=lambda a, out, g: (lambda: matmul_nt(g, a[1]), lambda: matmul_tn(a[0], g)),
    flops=lambda x, w: 2.0 * shape(w)[0] * shape(w)[1],
    shard="row",
)
matmul_tn: Operator = Operator(
    "matmul_tn",  # (a, b): a^T b summed over rows; a parameter's gradient
    columns=lambda a, b: columns(b),
    flops=lambda a, b: 2.0 * columns(a) * columns(b),
    row_local=False,
    shard="reduce",
)
add: Operator = Operator(
    "add",
    columns=lambda a, b: columns(a),
    backward=lambda a, out, g: (lambda: g, lambda: g),
    flops=lambda a, b: float(columns(a)),
)
relu: Operator = Operator(
    "relu",
    columns=lambda u: columns(u),
    backward=lambda a, out, g: (lambda: where_bits(g, positive_bits(out)),),
    flops=lambda u: float(columns(u)),
)
positive_bits: Operator = Operator(
    "positive_bits",  # all that the gradient of ReLU reads: one bit per element, lossless
    columns=lambda out: columns(out),
    flops=lambda out: float(columns(out)),
    bits=1,
)
where_bits: Operator = Operator("where_bits", columns=lambda g, bits: columns(g), flops=lambda g, bits: float(columns(g)))
silu: Operator = Operator(
    "silu",
    columns=lambda u: columns(u),
    backward=lambda a, out, g: (lambda: silu_backward(g, a[0]),),
    flops=lambda u: 4.0 * columns(u),
)
silu_backward: Operator = Operator("silu_backward", columns=lambda g, u: columns(g), flops=lambda g, u: 8.0 * columns(g))
dropout: Operator = Operator(
    "dropout",  # (x, table, layer, salt): the mask is a hash of (row's seed, layer, salt, column): nothing is kept of it
    columns=lambda x, table, layer, salt: columns(x),
    backward=lambda a, out, g: (lambda: dropout(g, *a[1:]), None, None, None),
    flops=lambda x, table, layer, salt: 8.0 * columns(x),
)

# ------------------------------------------------------------------------------------------ parameters pooled over adapters
scale_columns: Operator = Operator(
    "scale_columns",  # (u, mask): the rank mask selects the adapter that owns a row
    columns=lambda u, mask: columns(u),
    backward=lambda a, out, g: (lambda: scale_columns(g, a[1]), None),
    flops=lambda u, mask: float(columns(u)),
)
scale_ranks: Operator = Operator(
    "scale_ranks",  # (u, d): column j times d[j, 0], the owner's own
    columns=lambda u, d: columns(u),
    backward=lambda a, out, g: (lambda: scale_ranks(g, a[1]), lambda: sum_ranks(g, a[0])),
    flops=lambda u, d: float(columns(u)),
)
add_ranks: Operator = Operator(
    "add_ranks",  # (u, b): column j plus b[j, 0]
    columns=lambda u, b: columns(u),
    backward=lambda a, out, g: (lambda: g, lambda: sum_ranks(g, None)),
    flops=lambda u, b: float(columns(u)),
)
sum_ranks: Operator = Operator(
    "sum_ranks",  # (g, u): columns' sums over rows of g * u, or of g alone, [R, 1]
    columns=lambda g, u: 1,
    flops=lambda g, u: 2.0 * columns(g),
    row_local=False,
    shard="reduce",
)
mul_slot: Operator = Operator(
    "mul_slot",  # (y, v, index): row i times row index[i] of v, its adapter's own
    columns=lambda y, v, index: columns(y),
    backward=lambda a, out, g: (lambda: mul_slot(g, a[1], a[2]), lambda: sum_slot(g, a[0]), None),
    flops=lambda y, v, index: float(columns(y)),
)
add_slot: Operator = Operator(
    "add_slot",  # (y, v, index)
    columns=lambda y, v, index: columns(y),
    backward=lambda a, out, g: (lambda: g, lambda: sum_slot(g, None), None),
    flops=lambda y, v, index: float(columns(y)),
)
sum_slot: Operator = Operator(
    "sum_slot",  # (g, y): the sum over rows of g * y, or of g alone, [1, columns]
    columns=lambda g, y: columns(g),
    flops=lambda g, y: 2.0 * columns(g),
    row_local=False,
    shard="reduce",
)
add_bias: Operator = Operator(
    "add_bias",  # (y, bias, sign): a frozen bias, added or taken off again
    columns=lambda y, bias, sign: columns(y),
    backward=lambda a, out, g: (lambda: g, None, None),
    flops=lambda y, bias, sign: float(columns(y)),
)
replace_rows: Operator = Operator(
    "replace_rows",  # (x, v, rows): row i is row rows[i] of v where that is not negative (a virtual token), else x's own
    columns=lambda x, v, rows: columns(x),
    backward=lambda a, out, g: (lambda: keep_rows(g, a[2]), lambda: scatter_rows(g, a[1], a[2]), None),
)
keep_rows: Operator = Operator("keep_rows", columns=lambda g, rows: columns(g))  # zero where rows[i] >= 0
scatter_rows: Operator = Operator(
    "scatter_rows",  # (g, v, rows): the gradient of v
    columns=lambda g, v, rows: columns(g),
    row_local=False,
    shard="reduce",
)
split: Operator = Operator(
    "split",  # (x, sizes)
    columns=lambda x, sizes: tuple(sizes),
    backward=lambda a, out, g: (lambda: concat(*_with_zeros(g, a[1])), None),
)
zeros: Operator = Operator("zeros", columns=lambda like, columns: columns)  # as many rows as `like` has
concat: Operator = Operator(
    "concat",
    columns=lambda *parts: sum(columns(p) for p in parts),
    backward=lambda a, out, g: tuple((lambda i=i: split(g, tuple(columns(p) for p in a))[i]) for i in range(len(a))),
)

# ---------------------------------------------------------------------------------------- normalisation and elementwise
rms_norm: Operator = Operator(
    "rms_norm",  # (x, weight, eps); the norm's weight is frozen
    columns=lambda x, w, eps: columns(x),
    backward=lambda a, out, g: (lambda: rms_norm_dx(g, *a), None, None),
    flops=lambda x, w, eps: 4.0 * columns(x),
)
rms_norm_dx: Operator = Operator("rms_norm_dx", columns=lambda g, x, w, eps: columns(x), flops=lambda g, x, w, eps: 9.0 * columns(x))
head_rms_norm: Operator = Operator(
    "head_rms_norm",
    columns=lambda x, w, eps: columns(x),
    backward=lambda a, out, g: (lambda: head_rms_norm_dx(g, *a), None, None),
    flops=lambda x, w, eps: 4.0 * columns(x),
    shard="head",
)
head_rms_norm_dx: Operator = Operator(
    "head_rms_norm_dx", columns=lambda g, x, w, eps: columns(x), flops=lambda g, x, w, eps: 9.0 * columns(x), shard="head"
)
rope: Operator = Operator(
    "rope",  # (x, cos, sin)
    columns=lambda x, cos, sin: columns(x),
    backward=lambda a, out, g: (lambda: rope_transpose(g, a[1], a[2]), None, None),
    flops=lambda x, cos, sin: 3.0 * columns(x),
    shard="head",
)
rope_transpose: Operator = Operator(
    "rope_transpose", columns=lambda g, cos, sin: columns(g), flops=lambda g, cos, sin: 3.0 * columns(g), shard="head"
)
swiglu: Operator = Operator(
    "swiglu",  # (gate, up)
    columns=lambda g, u: columns(g),
    backward=lambda a, out, dm: _both(swiglu_backward, (dm, a[0], a[1])),
    flops=lambda g, u: 5.0 * columns(g),
)
swiglu_backward: Operator = Operator(
    "swiglu_backward", columns=lambda dm, g, u: (columns(g), columns(u)), flops=lambda dm, g, u: 10.0 * columns(g)
)

# ------------------------------------------------------------------------------------------------------------ attention
attend: Operator = Operator(
    "attend",  # (q, k, v): writes k, v to the pages and attends to them; gives o and, for window rows, the log-sum-exp
    columns=lambda q, k, v: (columns(q), columns(q) // q.node.meta["head_dim"]),
    backward=lambda a, out, g: _both(attend_backward, (g[0], a[0], out[0], out[1])),
    pair_flops=lambda q, k, v: 4.0 * columns(q),
    row_local=False,
    shard="head",
    context=True,
    fp32_outputs=(1,),
)
attend_backward: Operator = Operator(
    "attend_backward",  # (do, q, o, lse): K and V come from the pages; dK, dV are finished rows of the accumulators
    columns=lambda do, q, o, lse: (columns(q), q.node.meta["kv_columns"], q.node.meta["kv_columns"]),
    pair_flops=lambda do, q, o, lse: 10.0 * columns(q),
    row_local=False,
    shard="head",
    context=True,
)


def _with_zeros(grads: Sequence[Proxy | None], sizes: Sequence[int]) -> list[Proxy]:
    """The gradients of parts, some of which (but not all) nothing reads."""
    known = next(g for g in grads if g is not None)
    return [zeros(known, size) if g is None else g for g, size in zip(grads, sizes, strict=True)]


def _both(op: Operator, args: tuple[Any, ...]) -> tuple[Gradient, ...]:
    """Gradients that one operator produces together: it is appended once, whichever is asked for first."""
    made: list[tuple[Any, ...]] = []

    def pick(i: int) -> Proxy:
        if not made:
            made.append(op(*args))
        return made[0][i]

    results = op.columns(*args)
    assert isinstance(results, tuple)
    return tuple((lambda i=i: pick(i)) for i in range(len(results)))
