"""What the forward saves for the backward. Two levels:

`keep`       every tensor the pruned backward reads;
`recompute`  the fewest bytes from which the rest can be rebuilt by cheap row-local operators (norms, RoPE,
             SwiGLU): an exact minimum cut between what only a base GEMM or attention can produce and what is needed.
K and V are not counted: they stay in the sequence's pages anyway.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import networkx as nx
from torch.fx import Node

from flexllm.compiler.prune import PrunedBackward, is_row_value
from flexllm.ops.operators import Operator

LEVELS = ("keep", "recompute")


@dataclass(frozen=True)
class SavedTensor:
    """One row per token in the activation store. `pooled`: in the fused forward its columns lie side by side with other adapters'."""

    name: str
    columns: int
    fp32: bool
    pooled: bool

    def bytes_per_token(self, itemsize: int) -> int:
        return self.columns * (max(4, itemsize) if self.fp32 else itemsize)


def choose_saved(backward: PrunedBackward, level: str) -> dict[Node, SavedTensor]:
    """Raises ValueError for an unknown level."""
    if level not in LEVELS:
        raise ValueError(f"save level must be one of {', '.join(LEVELS)}, got {level!r}")
    nodes = backward.needed if level == "keep" else _minimum_cut(backward)
    return {n: _saved(n) for n in nodes}


def _saved(node: Node) -> SavedTensor:
    return SavedTensor(node.meta["names"][0], node.meta["columns"], node.meta.get("fp32", False), node.meta.get("pooled", False))


def rebuilt_from(node: Node) -> list[Node] | None:
    """The row values from which `node` can be recomputed cheaply; None if only a base GEMM or attention can produce it."""
    source = node
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
    if not isinstance(source.target, Operator) or not source.target.recompute:
        return None
    inputs: list[Node] = []
    for arg in source.all_input_nodes:
        if "columns" not in arg.meta:
            continue  # a weight, parameter or table: always at hand
        if isinstance(arg.meta["columns"], tuple):
            return None
        inputs.append(arg)
    return inputs


def _minimum_cut(backward: PrunedBackward) -> list[Node]:
    """Each value is an edge make -> use whose capacity is its bytes (endless if it cannot be saved): cutting it means saving it.

    Of equal cuts networkx returns the one nearest to the sink, so what is needed is recomputed as little as possible.
    """
    if not backward.needed:
        return []
    flow = nx.DiGraph()
    values = [n for n in backward.joint.forward_nodes if is_row_value(n)]
    for node in values:
        capacity = {"capacity": _saved(node).bytes_per_token(2)} if "names" in node.meta else {}
        flow.add_edge((node, "make"), (node, "use"), **capacity)
        inputs = rebuilt_from(node)
        for source in inputs or ():
            flow.add_edge((source, "use"), (node, "make"))
        if inputs is None:
            flow.add_edge("gone", (node, "make"))
    for node in backward.needed:
        flow.add_edge((node, "use"), "needed")
    _, (gone, _) = nx.minimum_cut(flow, "gone", "needed")
    order = {n: i for i, n in enumerate(backward.joint.layer.graph.nodes)}
    return sorted((n for n in values if (n, "make") in gone and (n, "use") not in gone), key=order.__getitem__)
