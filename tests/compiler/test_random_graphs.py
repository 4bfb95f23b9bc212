"""Random layers: the compiled passes give autograd's gradients at every choice, and each choice is minimal and the cheapest."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch.fx import Node, Proxy

from flexllm.compiler.emit import emit_backward
from flexllm.compiler.remat import Choice, DeviceCosts, Rematerialization, read_by
from flexllm.model.layer import tag
from flexllm.ops import operators as ops
from flexllm.ops.operators import is_operator
from tests.compiler.graphs import HEAD_DIM, KERNELS, Builder, Layer, assert_same

WIDTHS = (4, 12, 20)  # whole heads; a ReLU's bits do not fill their bytes
PHASES = [p for p in Phase if p is not Phase.explain]  # which runs a failing example hundreds of times
SETTINGS = settings(deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SUMS_OVER_ROWS = ("matmul_tn", "sum_ranks", "sum_slot", "scatter_rows")  # gradients of parameters, and of nothing else
COSTS = st.builds(DeviceCosts, flops_per_second=st.sampled_from([1e9, 1e10, 3e10, 1e11]))


class _Growing:
    """A graph that grows by operators on values it has; each may or may not get a name, under which it can be saved."""

    def __init__(self, draw: Callable, most: int) -> None:
        self.draw = draw
        self.b = Builder(columns=draw(st.sampled_from(WIDTHS)), seed=draw(st.integers(0, 1000)))
        self.values = [self.b.x]
        for _ in range(draw(st.integers(most // 2, most))):
            grow = getattr(self, f"_{draw(st.sampled_from(OPERATORS))}")
            for value in grow(self.pick()):
                self.values.append(value)
                if draw(st.integers(0, 3)):
                    self.name(value)

    def name(self, value: Proxy) -> None:
        for i in range(self.draw(st.sampled_from([1, 1, 2]))):  # an identity site gives a value a second name
            tag(f"v{len(self.values)}{'ab'[i]}.out", value)
        if self.draw(st.integers(0, 3)) == 0:
            value.node.meta["pooled"] = "kind"

    def pick(self, width: int | None = None) -> Proxy:
        """A value, or one of that width, made where there is none. Recent ones more often: deep graphs are the rule."""
        fitting = [v for v in self.values if width in (None, ops.columns(v))]
        if not fitting:
            value = self.pick()
            return ops.linear(value, self.b.weight(width, ops.columns(value)), None)
        return fitting[-1 - min(self.draw(st.integers(0, 4)), len(fitting) - 1)]

    def parameter(self, rows: int, width: int) -> Proxy:
        """A new one, or now and then one that is used elsewhere."""
        fitting = [n for n, p in self.b.parameters.items() if p.meta["shape"] == (rows, width)]
        if fitting and self.draw(st.booleans()):
            return Proxy(self.b.parameters[fitting[0]], self.b.x.tracer)
        return self.b.parameter(rows, width)

    def width(self) -> int:
        return self.draw(st.sampled_from(WIDTHS))

    # ------------------------------------------------------------------------------------------------------- operators
    def _linear(self, x: Proxy) -> list[Proxy]:
        out = self.width()
        return [ops.linear(x, self.b.weight(out, ops.columns(x)), self.b.vector(out) if self.draw(st.booleans()) else None)]

    def _matmul_nt(self, x: Proxy) -> list[Proxy]:
        return [ops.matmul_nt(x, self.parameter(self.width(), ops.columns(x)))]

    def _matmul_nn(self, x: Proxy) -> list[Proxy]:
        return [ops.matmul_nn(x, self.parameter(ops.columns(x), self.width()))]

    def _low_rank(self, x: Proxy) -> list[Proxy]:
        """LoRA's pattern, which the emitter folds into its sum."""
        y = self.pick()
        u = tag(f"u{len(self.values)}", ops.matmul_nt(x, self.parameter(2, ops.columns(x))))
        return [ops.add(y, ops.matmul_nn(u, self.parameter(2, ops.columns(y))))]

    def _add(self, x: Proxy) -> list[Proxy]:
        return [ops.add(x, self.pick(ops.columns(x)))]

    def _swiglu(self, x: Proxy) -> list[Proxy]:
        return [ops.swiglu(x, self.pick(ops.columns(x)))]

    def _split(self, x: Proxy) -> list[Proxy]:
        if ops.columns(x) == HEAD_DIM:
            x = ops.linear(x, self.b.weight(12, HEAD_DIM), None)
        return list(ops.split(x, (HEAD_DIM, ops.columns(x) - HEAD_DIM)))

    def _merged(self, x: Proxy) -> list[Proxy]:
        """A bypass at one part of a merged GEMM, whose whole others may read."""
        whole = ops.linear(x, self.b.weight(12, ops.columns(x)), None)
        first, second = ops.split(whole, (HEAD_DIM, 12 - HEAD_DIM))
        return [whole, second, ops.add(first, self.pick(HEAD_DIM))]

    def _concat(self, x: Proxy) -> list[Proxy]:
        return [ops.concat(x, self.pick(), self.pick())] if ops.columns(x) <= 12 else self._split(x)

    def _rms_norm(self, x: Proxy) -> list[Proxy]:
        return [ops.rms_norm(x, self.b.vector(ops.columns(x)), 1e-5)]

    def _head_rms_norm(self, x: Proxy) -> list[Proxy]:
        return [ops.head_rms_norm(x, self.b.vector(HEAD_DIM), 1e-5)]

    def _rope(self, x: Proxy) -> list[Proxy]:
        angles = self.b.random(self.b.rows, 1).expand(-1, HEAD_DIM)
        return [ops.rope(x, self.b.table(angles.cos()), self.b.table(angles.sin()))]

    def _relu(self, x: Proxy) -> list[Proxy]:
        return [ops.relu(x)]

    def _silu(self, x: Proxy) -> list[Proxy]:
        return [ops.silu(x)]

    def _dropout(self, x: Proxy) -> list[Proxy]:
        seeds, rates = torch.arange(self.b.rows) * 77, torch.tensor([0.0, 0.5, 0.3, 0.0, 0.9])
        return [ops.dropout(x, self.b.table((seeds, rates)), self.b.table(3), len(self.values))]

    def _scale_columns(self, x: Proxy) -> list[Proxy]:
        mask = self.b.random(self.b.rows, ops.columns(x)) if self.draw(st.booleans()) else 0.7
        return [ops.scale_columns(x, self.b.table(mask))]

    def _scale_ranks(self, x: Proxy) -> list[Proxy]:
        return [ops.scale_ranks(x, self.parameter(ops.columns(x), 1))]

    def _add_ranks(self, x: Proxy) -> list[Proxy]:
        return [ops.add_ranks(x, self.parameter(ops.columns(x), 1))]

    def _mul_slot(self, x: Proxy) -> list[Proxy]:
        return [ops.mul_slot(x, self.parameter(1, ops.columns(x)), self.b.table(0))]

    def _add_slot(self, x: Proxy) -> list[Proxy]:
        return [ops.add_slot(x, self.parameter(1, ops.columns(x)), self.b.table(0))]

    def _add_bias(self, x: Proxy) -> list[Proxy]:
        return [ops.add_bias(x, self.b.vector(ops.columns(x)), self.draw(st.sampled_from([1, -1])))]

    def _replace_rows(self, x: Proxy) -> list[Proxy]:
        rows = self.draw(st.sampled_from([[-1, 1, 0, -1, -1], [-1] * 5, [0, 1, 2, -1, -1]]))
        return [ops.replace_rows(x, self.parameter(3, ops.columns(x)), self.b.table(torch.tensor(rows)))]

    def _attend(self, q: Proxy) -> list[Proxy]:
        """One to a layer: its pages are the layer's."""
        if any(n.target is ops.attend for n in self.b.graph.nodes):
            return self._relu(q)
        k, v = self.pick(HEAD_DIM), self.pick(HEAD_DIM)
        q.node.meta.update(head_dim=HEAD_DIM, kv_columns=HEAD_DIM)
        for paged in (k, v):
            paged.node.meta["paged"] = True
        o, lse = ops.attend(q, k, v)
        if self.draw(st.booleans()):
            tag("lse", lse)
        return [o]

    def output(self) -> Proxy:
        """The sum of what nothing else reads; some of it is left out, and is dead."""
        loose = [v for v in self.values if not v.node.users]
        while len(loose) > 1 and self.draw(st.integers(0, 4)) == 0:
            loose.pop(self.draw(st.integers(0, len(loose) - 1)))
        total = loose[0]
        for value in loose[1:]:
            same = ops.columns(value) == ops.columns(total)
            total = ops.add(total, value if same else ops.linear(value, self.b.weight(ops.columns(total), ops.columns(value)), None))
        return total


OPERATORS = [name[1:] for name, f in vars(_Growing).items() if re.fullmatch("_[a-z].*", name) and callable(f)]
OPERATORS += ["attend", "low_rank"] * 2  # what a layer is about


@st.composite
def layers(draw: Callable, most: int = 12) -> Layer:
    growing = _Growing(draw, most)
    output = growing.output()
    trainable = [n for n in growing.b.parameters if draw(st.integers(0, 4))]
    return growing.b.layer(output, trainable)


def choices(remat: Rematerialization) -> list[Choice]:
    return [remat.keep(), *remat.frontier()]


def read(remat: Rematerialization, choice: Choice) -> set[Node]:
    """What the backward reads: its live operators, and those that run again."""
    return {source for op in remat.backward.live | remat.recomputed(choice.saved) for source in read_by(op)}


# ------------------------------------------------------------------------------------------------------------- gradients
@settings(SETTINGS, max_examples=60)
@given(layer=layers(), input_gradient=st.booleans(), costs=COSTS)
def test_gradients_are_autograds(layer: Layer, input_gradient: bool, costs: DeviceCosts) -> None:
    """Whatever is saved; and what is saved is the forward's values, which the backward leaves as they are."""
    pruned = layer.pruned(input_gradient)
    values, want = layer.autograd(pruned.joint.forward_nodes)
    if not input_gradient:
        del want["x"]
    for choice in choices(Rematerialization(pruned, costs, context=10)):
        y, context = layer.run(pruned, choice)
        assert_same({"y": y}, {"y": values[layer.graph.output]})
        kept = {n.meta["names"][0]: values[n] for n in choice.saved if n in values}  # bits are no value of the plain graph
        for _ in range(2):
            assert_same({n: context.saved[n] for n in kept}, kept)
            assert_same(layer.run_backward(pruned, choice, context, dict(context.saved)), want)


# ------------------------------------------------------------------------------------------------------------ minimality
@settings(SETTINGS, max_examples=40)
@given(layer=layers(), input_gradient=st.booleans(), costs=COSTS)
def test_nothing_is_saved_for_nobody(layer: Layer, input_gradient: bool, costs: DeviceCosts) -> None:
    """Every saved tensor is read: without any one of them the backward fails."""
    pruned = layer.pruned(input_gradient)
    remat = Rematerialization(pruned, costs, context=10)
    for choice in choices(remat):
        assert set(choice.saved) <= read(remat, choice)
        _, context = layer.run(pruned, choice)
        assert len(context.saved) == len(choice.saved)
        for name in context.saved:
            rest = {n: v for n, v in context.saved.items() if n != name}
            with pytest.raises(KeyError, match=re.escape(name)):
                layer.run_backward(pruned, choice, context, rest)


@settings(SETTINGS, max_examples=40)
@given(layer=layers(), input_gradient=st.booleans())
def test_nothing_runs_for_nobody(layer: Layer, input_gradient: bool) -> None:
    """Every live operator is on a path to a gradient that is asked for; no gradient of a frozen weight is written down."""
    pruned = layer.pruned(input_gradient)
    outputs = set(pruned.outputs.values())
    assert all(node in outputs or any(u in pruned.live for u in node.users) for node in pruned.live - {pruned.joint.dy})
    assert pruned.outputs.keys() <= layer.graph.parameters.keys() | ({"x"} if input_gradient else set())
    assert all(any(u in pruned.live for u in value.users) for value in pruned.needed)
    trained = set(layer.graph.parameters.values())
    remat = Rematerialization(pruned, DeviceCosts(), context=10)
    for choice in choices(remat):
        source = emit_backward(pruned, choice.saved, KERNELS).source
        for value, gradient in pruned.joint.gradients.items():
            if value.op == "placeholder" and value is not layer.graph.x and value not in trained:
                assert gradient not in pruned.live
                assert not re.search(rf"(?<![.\w]){gradient.name}\b", source)
        sums = [n for n in pruned.live if is_operator(n) and n.target.name in SUMS_OVER_ROWS]
        assert len(re.findall(rf"ops\.({'|'.join(SUMS_OVER_ROWS)})\(", source)) == len(sums)


# ----------------------------------------------------------------------------------------------------------- minimum cut
def every_choice(remat: Rematerialization) -> list[Choice]:
    """By brute force: each set of named values from which the backward can run."""
    named = [n for n in (*remat.inputs, *remat.values) if "names" in n.meta]
    assume(len(named) <= 9)
    found = []
    for size in range(len(named) + 1):
        for saved in itertools.combinations(named, size):
            with contextlib.suppress(ValueError):  # the layer's input is missing
                found.append(remat.choice(saved))
    return found


@settings(SETTINGS, max_examples=60)
@given(
    layer=layers(most=8),
    input_gradient=st.booleans(),
    costs=COSTS,
    prices=st.lists(st.floats(1e-13, 1e-6), min_size=3, max_size=3),
)
def test_choices_are_the_cheapest(layer: Layer, input_gradient: bool, costs: DeviceCosts, prices: list[float]) -> None:
    remat = Rematerialization(layer.pruned(input_gradient), costs, context=10)
    everything = every_choice(remat)

    def least(price: float) -> float:
        return min(c.seconds + price * c.bytes_per_token for c in everything)

    def is_least(choice: Choice, price: float) -> bool:
        return choice.seconds + price * choice.bytes_per_token <= least(price) * (1 + 1e-9)

    assert all(is_least(remat._cheapest(price), price) for price in (0.0, *prices))
    frontier = remat.frontier()
    assert is_least(frontier[0], 0.0)
    for left, right in itertools.pairwise(frontier):  # an edge of the lower hull: nothing lies below the line through it
        price = (right.seconds - left.seconds) / (left.bytes_per_token - right.bytes_per_token)
        assert price >= 0
        assert is_least(left, price)
        assert is_least(right, price)
    fewest = min(c.bytes_per_token for c in everything)
    smallest = min(c.seconds for c in everything if c.bytes_per_token == fewest)
    assert frontier[-1].bytes_per_token == fewest
    assert frontier[-1].seconds <= smallest * (1 + 1e-9)
