"""Reverse-mode differentiation of an operator graph, in operators.

Every gradient is written down, those of frozen weights too; pruning then removes what no trainable parameter needs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from flexllm.compiler.trace import LayerGraph
from flexllm.ops.operators import Operator, add, is_operator


@dataclass
class JointGraph:
    """Forward and backward of a layer in one graph. `gradients` maps a forward value to its gradient."""

    layer: LayerGraph
    dy: Node  # placeholder: gradient of the layer's output
    gradients: dict[Node, Node]
    forward_nodes: frozenset[Node]


def differentiate(layer: LayerGraph) -> JointGraph:
    graph = layer.graph
    tracer = GraphAppendingTracer(graph)
    forward = list(graph.nodes)
    dy = tracer.create_proxy("placeholder", "dy", (), {})
    dy.node.meta.update(columns=layer.output.meta["columns"], source="dy")
    grads: dict[Node, Proxy] = {layer.output: dy}

    def accumulate(node: Node, grad: Proxy) -> None:
        grads[node] = add(grads[node], grad) if node in grads else grad

    for node in reversed(forward):
        if not is_operator(node):
            continue
        op = node.target
        assert isinstance(op, Operator)
        results = [u for u in node.users if u.op == "call_function" and u.target is operator.getitem]
        if results:
            by_index = {int(u.args[1]): u for u in results}  # type: ignore[arg-type]
            outs = tuple(Proxy(by_index[i], tracer) for i in range(len(results)))
            grad = tuple(grads.get(by_index[i]) for i in range(len(results)))
            known = any(g is not None for g in grad)
        else:
            outs, grad = Proxy(node, tracer), grads.get(node)  # type: ignore[assignment]
            known = grad is not None
        if not known or op.backward is None:
            continue
        args = [Proxy(a, tracer) if isinstance(a, Node) else a for a in node.args]
        for arg, thunk in zip(node.args, op.backward(args, outs, grad), strict=True):
            if isinstance(arg, Node) and thunk is not None:
                accumulate(arg, thunk())
    return JointGraph(layer, dy.node, {n: g.node for n, g in grads.items()}, frozenset(forward))
