"""Graph pruning: from the trainable parameters, keep only the gradients on a path to them and the forward values those read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from flexllm.compiler.autodiff import JointGraph


@dataclass
class PrunedBackward:
    """`live`: the backward operators that run. `needed`: the forward values they read (weights, parameters and tables apart)."""

    joint: JointGraph
    outputs: dict[str, Node]  # parameter name -> its gradient; "x" -> gradient of the layer's input, where a lower layer needs it
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
    live = _ancestors(outputs.values(), joint.forward_nodes)
    needed = [n for n in layer.graph.nodes if n in joint.forward_nodes and is_row_value(n) and any(u in live for u in n.users)]
    dropped = []
    for value, grad in joint.gradients.items():
        if grad not in live and grad is not joint.dy:
            frozen = value.meta.get("frozen", False)
            why = "the weight is frozen" if frozen else "no trainable parameter below needs it"
            dropped.append((value, why))
    return PrunedBackward(joint, outputs, live, tuple(needed), tuple(dropped))


def _ancestors(roots: Iterable[Node], stop: frozenset[Node]) -> frozenset[Node]:
    seen: set[Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(seen)
