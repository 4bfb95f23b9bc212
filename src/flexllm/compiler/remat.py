"""What the forward saves for the backward, and what the backward runs again: the least time for a number of bytes, exactly.

Every value of the forward can be saved or rebuilt from others, GEMMs and attention included (attention reads the keys and values
that stay in the sequence's pages). For a price per byte the best choice is a minimum cut; letting the price rise from zero
walks down the lower convex hull of (bytes, seconds), from which the levels are taken (compiler/levels.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov
from torch.fx import Node

from flexllm.compiler.prune import PrunedBackward, is_row_value
from flexllm.ops.operators import attend, is_operator

ITEMSIZE = 2  # bf16: what costs are reckoned in
SAVE_PASSES = 4  # saving a value writes it and reads it back; taking fresh memory for it costs about as much again


@dataclass(frozen=True)
class DeviceCosts:
    """What an operator takes on a device; only the ratio decides what is saved. Measured by profiler.measure_costs."""

    flops_per_second: float = 3e11
    bytes_per_second: float = 2e10

    def seconds(self, flops: float, nbytes: float) -> float:
        """Of one row of an operator that runs its arithmetic and its memory traffic one after the other, as small ones do."""
        return flops / self.flops_per_second + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class SavedTensor:
    """One row per token in the activation store. `pooled`: the kind of adapter whose columns lie side by side with this one's in
    the fused forward, or None."""

    name: str
    columns: int  # elements of the model's type; of uint8 where `bits` says how many an element takes
    fp32: bool = False
    pooled: str | None = None
    bits: int | None = None

    @property
    def stored_columns(self) -> int:
        return self.columns if self.bits is None else -(-self.columns * self.bits // 8)

    def bytes_per_token(self, itemsize: int) -> int:
        if self.bits is not None:
            return self.stored_columns
        return self.columns * (max(4, itemsize) if self.fp32 else itemsize)


@dataclass(frozen=True)
class Choice:
    """A point of the trade, per token: what to save, its bytes (bf16); seconds for saving it and for running the rest again, of
    which the latter, and their FLOPs."""

    saved: tuple[Node, ...]
    bytes_per_token: int
    seconds: float
    again_seconds: float
    again_flops: float


def saved_tensor(node: Node) -> SavedTensor:
    meta = node.meta
    return SavedTensor(meta["names"][0], meta["columns"], meta.get("fp32", False), meta.get("pooled"), meta.get("bits"))


def producer(node: Node) -> Node:
    """The operator that makes a value: itself, or the one whose tuple it is taken from."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def rebuilt_from(node: Node) -> list[Node] | None:
    """The row values from which `node` is recomputed; None for an input of the layer. Keys and values come from the pages."""
    made_by = producer(node)
    return [a for a in read_by(made_by) if is_row_value(a)] if is_operator(made_by) else None


def read_by(op: Node) -> list[Node]:
    """What an operator reads when the backward runs it: attention finds keys and values in the pages."""
    return op.all_input_nodes[:1] if op.target is attend else op.all_input_nodes


class Rematerialization:
    """The trade for one pruned backward. `context`: mean number of keys a row sees (attention's share of the costs)."""

    def __init__(self, backward: PrunedBackward, costs: DeviceCosts, context: int) -> None:
        self.backward, self.costs, self.context = backward, costs, context
        order = {n: i for i, n in enumerate(backward.joint.layer.graph.nodes)}
        self._order = order
        self._seconds: dict[Node, float] = {}
        self.values = sorted((n for n in backward.forward if is_row_value(n) and n.op == "call_function"), key=order.__getitem__)
        self.inputs = [n for n in backward.joint.layer.graph.nodes if n.op == "placeholder" and n in backward.forward and is_row_value(n)]

    # ---------------------------------------------------------------------------------------------------------- choices
    def keep(self) -> Choice:
        """Save everything that the backward reads, and of what has no name the nearest that has."""
        return self.choice(n for value in self.backward.needed for n in self._nearest_named(value))

    def named(self, names: Iterable[str]) -> Choice:
        """Save exactly these. ValueError for a name that the layer does not have."""
        known = {name: n for n in self.backward.forward for name in n.meta.get("names", ())}
        bad = [n for n in names if n not in known]
        if bad:
            raise ValueError(f"{bad[0]!r} is no value of the layer; those are {', '.join(known)}")
        return self.choice([known[n] for n in names])

    def choice(self, saved: Iterable[Node]) -> Choice:
        nodes = tuple(sorted(set(saved), key=self._order.__getitem__))
        nbytes = sum(saved_tensor(n).bytes_per_token(ITEMSIZE) for n in nodes)
        operators = self.recomputed(nodes)
        again = sum(self.op_seconds(op) for op in operators)
        return Choice(nodes, nbytes, again + sum(self._save_seconds(n) for n in nodes), again, self.flops(operators))

    def recomputed(self, saved: Iterable[Node]) -> frozenset[Node]:
        """Operators that the backward runs again. Raises ValueError when an input of the layer would be missing."""
        kept, again = set(saved), set[Node]()
        todo = list(self.backward.needed)
        while todo:
            value = todo.pop()
            if value in kept or producer(value) in again:
                continue
            sources = rebuilt_from(value)
            if sources is None:
                raise ValueError(f"{value} is not saved and nothing makes it")
            again.add(producer(value))
            todo += sources
        return frozenset(again)

    def flops(self, ops: Iterable[Node]) -> float:
        """Per token."""
        return sum(op.meta.get("flops", 0.0) + op.meta.get("pair_flops", 0.0) * self.context for op in ops)

    def op_seconds(self, op: Node) -> float:
        """Of one row."""
        if op not in self._seconds:
            columns = [c for a in (op, *op.all_input_nodes) for c in _columns(a)]
            self._seconds[op] = self.costs.seconds(self.flops([op]), sum(columns) * ITEMSIZE)
        return self._seconds[op]

    def _save_seconds(self, node: Node) -> float:
        return self.costs.seconds(0.0, SAVE_PASSES * saved_tensor(node).bytes_per_token(ITEMSIZE))

    # --------------------------------------------------------------------------------------------------------- frontier
    def frontier(self) -> list[Choice]:
        """The lower convex hull of (bytes, seconds): the fastest choice first, the smallest last."""
        fastest, smallest = self._cheapest(0.0), self._smallest()
        found = {fastest.bytes_per_token: fastest, smallest.bytes_per_token: smallest}

        def between(left: Choice, right: Choice) -> None:
            saving = left.bytes_per_token - right.bytes_per_token
            if saving <= 0:
                return
            middle = self._cheapest((right.seconds - left.seconds) / saving)
            if middle.bytes_per_token in found or not right.bytes_per_token < middle.bytes_per_token < left.bytes_per_token:
                return
            found[middle.bytes_per_token] = middle
            between(left, middle)
            between(middle, right)

        between(fastest, smallest)
        return [found[b] for b in sorted(found, reverse=True)]

    def _smallest(self) -> Choice:
        """The fastest among those of the fewest bytes: a price so high that no time is worth a byte."""
        slowest = sum(self.op_seconds(op) for op in {producer(v) for v in self.values})
        return self._cheapest(1e3 * max(slowest, 1e-12))

    def _cheapest(self, price: float) -> Choice:
        """The least seconds + price * bytes, as a minimum cut.

        Each value is two nodes: `have` (the backward has it) and `make` (its operator runs again). On the source's side means
        yes. have -> make costs what saving does (cut: it is there, but was not made), make -> sink what running the operator
        does, and what it reads must be there as well: make -> have of its sources, endless. Results of one operator share `make`.
        """
        flow = nx.DiGraph()
        for value in (*self.inputs, *self.values):
            save = self._save_seconds(value) + price * saved_tensor(value).bytes_per_token(ITEMSIZE) if "names" in value.meta else None
            sources = rebuilt_from(value)
            if sources is None:  # an input of the layer: saved, or not there
                flow.add_edge(("have", value), "sink", **({} if save is None else {"capacity": save}))
                continue
            made_by = producer(value)
            flow.add_edge(("have", value), ("make", made_by), **({} if save is None else {"capacity": save}))
            flow.add_edge(("make", made_by), "sink", capacity=self.op_seconds(made_by))
            for source in sources:
                flow.add_edge(("make", made_by), ("have", source))
        for value in self.backward.needed:
            flow.add_edge("source", ("have", value))
        if "source" not in flow:
            return self.choice(())
        _, (there, _) = nx.minimum_cut(_scaled(flow), "source", "sink", flow_func=boykov_kolmogorov)
        return self.choice(self._saved_by_cut(there))

    def _saved_by_cut(self, there: set[object]) -> Iterator[Node]:
        for value in self._named((*self.inputs, *self.values)):
            if ("have", value) in there and (rebuilt_from(value) is None or ("make", producer(value)) not in there):
                yield value

    def _nearest_named(self, value: Node) -> Iterator[Node]:
        if "names" in value.meta:
            yield value
        else:
            for source in rebuilt_from(value) or ():
                yield from self._nearest_named(source)

    @staticmethod
    def _named(values: Iterable[Node]) -> list[Node]:
        return [v for v in values if "names" in v.meta]


def _columns(node: Node) -> list[int]:
    columns = node.meta.get("columns", 0)
    return list(columns) if isinstance(columns, tuple) else [columns]


def _scaled(flow: nx.DiGraph) -> nx.DiGraph:
    """Capacities as integers, so that the cut is exact: a float residue of 1e-20 would leave an edge open."""
    largest = max((d["capacity"] for *_, d in flow.edges(data=True) if "capacity" in d), default=1.0)
    for *_, data in flow.edges(data=True):
        if "capacity" in data:
            data["capacity"] = round(data["capacity"] / largest * 2**50)
    return flow
