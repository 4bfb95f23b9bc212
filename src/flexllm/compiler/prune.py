"""Graph pruning: from the trainable parameters, keep only the gradients on a path to them and the forward values those read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from flexllm.compiler.autodiff import JointGraph
from flexllm.ops.operators import is_operator, matmul_nt


@dataclass
class PrunedBackward:
    """`live`: the backward operators that run. `needed`: the values of the forward that they read (weights, parameters and tables
    apart). `forward`: the forward's operators and those that compress a value of theirs into what a gradient reads of it: both can
    run in either pass."""

    joint: JointGraph
    outputs: dict[str, Node]  # parameter name -> its gradient; "x" -> gradient of the layer's input, where a lower layer needs it
    forward: frozenset[Node]
    live: frozenset[Node]
    needed: tuple[Node, ...]
    dropped: tuple[tuple[Node, str], ...]  # gradient operators removed, and why


def is_row_value(node: Node) -> bool:
    """A forward value with one row per token (not a weight, parameter or table)."""
    return "columns" in node.meta and not isinstance(node.meta["columns"], tuple)


def prune(joint: JointGraph, input_gradient: bool) -> PrunedBackward:
    """`input_gradient`: whether some lower layer is adapted."""
    layer = joint.layer
    outputs = {name: joint.gradients[node] for name, node in layer.parameters.items() if node in joint.gradients}
    if input_gradient:
        outputs["x"] = joint.gradients[layer.x]
    forward = joint.forward_nodes | _compressed(joint)
    live = _ancestors(outputs.values(), forward)
    needed = [n for n in layer.graph.nodes if n in forward and is_row_value(n) and any(u in live for u in n.users)]
    dropped = []
    for value, grad in joint.gradients.items():
        if grad not in live and grad is not joint.dy:
            frozen = value.meta.get("frozen", False)
            why = "the weight is frozen" if frozen else "no trainable parameter below needs it"
            dropped.append((value, why))
    return PrunedBackward(joint, outputs, forward, live, tuple(needed), tuple(dropped))


def _compressed(joint: JointGraph) -> frozenset[Node]:
    """Values that were written down with the gradients but follow from the forward alone (the sign bits of a ReLU)."""
    found, labels = set[Node](), set[str]()
    for node in joint.layer.graph.nodes:  # in order: what it reads is before it
        if node in joint.forward_nodes or not is_operator(node) or "bits" not in node.meta:
            continue
        if all(source in joint.forward_nodes for source in node.all_input_nodes):
            label = _label(node.all_input_nodes[0])
            if label is not None and label not in labels:  # without a name it is not saved
                labels.add(label)
                node.meta["names"] = [f"{label}.bits"]
            node.meta["pooled"] = _pool(node)
            found.add(node)
    return frozenset(found)


def _pool(node: Node) -> str | None:
    """The kind of adapter over which a value's columns are pooled: as the product with a rank-pooled parameter has them, and what
    follows from it element by element."""
    while is_operator(node) and node.target is not matmul_nt and node.target.shard == "same":  # type: ignore[union-attr]
        node = node.all_input_nodes[0]
    return node.all_input_nodes[1].meta.get("pooled") if node.target is matmul_nt else None


def _label(node: Node) -> str | None:
    """A name that is the same in a job's graph and in the fused forward's: the value's own or that of what it is made from."""
    return next((v.meta["names"][0] for v in (node, *node.all_input_nodes) if "names" in v.meta), None)


def _ancestors(roots: Iterable[Node], stop: frozenset[Node]) -> frozenset[Node]:
    seen: set[Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(seen)
