"""Layers written by hand: a graph of operators with a tensor behind each placeholder, run as the engine does and by autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from flexllm.compiler.autodiff import differentiate
from flexllm.compiler.emit import emit_backward, emit_forward
from flexllm.compiler.prune import PrunedBackward, prune
from flexllm.compiler.remat import Choice
from flexllm.compiler.trace import LayerGraph
from flexllm.model.layer import tag
from flexllm.ops.operators import Operator
from flexllm.ops.reference import LinearWeight, ReferenceKernels

KERNELS = ReferenceKernels()
HEAD_DIM = 4


class Builder:
    """Placeholders as compiler/trace.py makes them, all of random float64."""

    def __init__(self, columns: int, rows: int = 5, seed: int = 0) -> None:
        self.graph, self.rows = Graph(), rows
        self._tracer = GraphAppendingTracer(self.graph)
        self._generator = torch.Generator().manual_seed(seed)
        self.w, self.p, self.t = SimpleNamespace(), dict[str, Tensor](), dict[str, Any]()
        self.parameters: dict[str, Node] = {}  # those that may be trained
        self.x_value = self.random(rows, columns)
        self.x = tag("x", self._placeholder("x", columns=columns))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64) * 0.6

    def _placeholder(self, source: str, **meta: Any) -> Proxy:
        proxy = self._tracer.create_proxy("placeholder", "".join(c if c.isalnum() else "_" for c in source), (), {})
        proxy.node.meta.update(source=source, **meta)
        return proxy

    def weight(self, out: int, size: int) -> Proxy:
        """Of a base GEMM."""
        name = f"linear{len(vars(self.w))}"
        setattr(self.w, name, LinearWeight(self.random(out, size)))
        return self._placeholder(f"w.{name}", shape=(out, size), frozen=True)

    def vector(self, size: int) -> Proxy:
        """A norm's weight or a bias."""
        name = f"vector{len(vars(self.w))}"
        setattr(self.w, name, self.random(size) + 1)
        return self._placeholder(f"w.{name}", shape=None, frozen=True)

    def parameter(self, rows: int, width: int) -> Proxy:
        name = f"p{len(self.p)}"
        self.p[name] = self.random(rows, width)
        proxy = self._placeholder(f'p["{name}"]', shape=(rows, width), pooled="kind")
        self.parameters[name] = proxy.node
        return proxy

    def table(self, value: Any) -> Proxy:
        name = f"t{len(self.t)}"
        self.t[name] = value
        return self._placeholder(f't["{name}"]')

    def layer(self, output: Proxy, trainable: list[str] | None = None) -> Layer:
        """`trainable`: names of parameters, by default all."""
        chosen = {n: node for n, node in self.parameters.items() if trainable is None or n in trainable}
        graph = LayerGraph(self.graph, self.x.node, output.node, chosen)
        return Layer(graph, self.x_value, self.w, self.p, self.t, self.random(self.rows, output.node.meta["columns"]))


@dataclass
class Context:
    """Of one sequence whose rows all come at once; the pages hold what the forward's attention put there."""

    saved: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    pages: list[Tensor] = field(default_factory=list)

    def save(self, name: str, value: Tensor) -> None:
        assert name not in self.saved
        self.saved[name] = value  # no copy: neither does a rebuilt segment

    def save_pooled(self, _kind: str, name: str, value: Tensor, pack: Callable[[Tensor], Tensor] | None = None) -> None:
        self.save(name, pack(value) if pack else value)

    def gradient(self, name: str, value: Tensor) -> None:
        assert name not in self.gradients
        self.gradients[name] = value

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.pages:
            assert k is not None
            assert v is not None
            self.pages = [k.unflatten(1, (-1, HEAD_DIM)).clone(), v.unflatten(1, (-1, HEAD_DIM)).clone()]
        o, lse = KERNELS.window_attention(q.unflatten(1, (-1, HEAD_DIM)), *self.pages, HEAD_DIM**-0.5)
        return o.flatten(1), lse

    def attend_backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        do, q, o = (t.unflatten(1, (-1, HEAD_DIM)) for t in (do, q, o))
        return tuple(g.flatten(1) for g in KERNELS.window_attention_backward(do, q, *self.pages, o, lse, HEAD_DIM**-0.5))


@dataclass(repr=False)
class Layer:
    graph: LayerGraph
    x: Tensor
    w: SimpleNamespace
    p: dict[str, Tensor]
    t: dict[str, Any]
    dy: Tensor

    def __repr__(self) -> str:
        return f"{self.graph.graph}\ntrainable: {', '.join(self.graph.parameters)}"

    def pruned(self, input_gradient: bool = True) -> PrunedBackward:
        return prune(differentiate(self.graph), input_gradient)

    def run(self, pruned: PrunedBackward, choice: Choice) -> tuple[Tensor, Context]:
        """The emitted forward."""
        context = Context()
        forward = emit_forward(pruned, KERNELS, [n.meta["names"][0] for n in choice.saved])
        return forward.function(self.x, self.w, self.p, self.t, context), context

    def run_backward(self, pruned: PrunedBackward, choice: Choice, context: Context, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """The emitted backward: gradients by parameter, and that of the input as "x" if there is one."""
        backward = emit_backward(pruned, choice.saved, KERNELS)
        context.gradients = {}
        dx = backward.function(self.dy.clone(), saved, self.w, self.p, self.t, context)
        return context.gradients | ({} if dx is None else {"x": dx})

    def gradients(self, pruned: PrunedBackward, choice: Choice) -> dict[str, Tensor]:
        """Both, one after the other."""
        _, context = self.run(pruned, choice)
        return self.run_backward(pruned, choice, context, context.saved)

    def autograd(self, forward_nodes: frozenset[Node]) -> tuple[dict[Node, Tensor], dict[str, Tensor]]:
        """The same graph interpreted in plain torch: every value, and the gradients of the trainable parameters and of x."""
        scope = {"x": self.x.clone().requires_grad_(), "w": self.w, "p": self.p, "t": self.t}
        leaves = {"x": scope["x"]}
        values: dict[Node, Any] = {}
        for node in self.graph.graph.nodes:
            if node not in forward_nodes:
                continue
            args = [values[a] if isinstance(a, Node) else a for a in node.args]
            if node.op == "placeholder":
                values[node] = eval(node.meta["source"], dict(scope))
                for name in (n for n, p in self.graph.parameters.items() if p is node):
                    leaves[name] = values[node] = values[node].clone().requires_grad_()
            elif node.target is operator.getitem:
                values[node] = args[0][args[1]]
            else:
                assert isinstance(node.target, Operator)
                values[node] = getattr(Context() if node.target.context else KERNELS, node.target.name)(*args)
        values[self.graph.output].backward(self.dy)
        values = {n: v.detach() for n, v in values.items() if isinstance(v, Tensor)}
        return values, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """What the compiler leaves out is zero."""
    assert got.keys() <= want.keys(), f"{sorted(got)} instead of {sorted(want)}"
    for name, exact in want.items():
        value = got.get(name, torch.zeros_like(exact))
        assert value.shape == exact.shape, f"{name}: {list(value.shape)} instead of {list(exact.shape)}"
        error = float((value - exact).abs().max())
        assert error <= tolerance * max(1.0, float(exact.abs().max())), f"{name}: off by {error:.1e}"
