"""Trace the decoder layer with its bypass networks into one graph of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from flexllm.model.config import ModelConfig
from flexllm.model.layer import SITES, decoder_layer, site_shapes, tag
from flexllm.peft.base import PeftMethod


@dataclass
class LayerGraph:
    """`source` in a placeholder's meta is the expression that binds it in an emitted function: `w.<weight>`,
    `p["<site>.<parameter>"]`, `t["<table>"]`, or a bare name for an argument."""

    graph: Graph
    x: Node
    output: Node
    parameters: dict[str, Node]  # "<site>.<name>" -> placeholder
    named: dict[str, Node] = field(default_factory=dict)  # values that can be saved, by name

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            for name in node.meta.get("names", ()):
                assert name not in self.named, f"two values are named {name}"
                self.named[name] = node


class _Weights:
    """`w.qkv` makes the placeholder of that weight on first use."""

    def __init__(self, inputs: _Inputs, shapes: Mapping[str, tuple[int, int]], absent: Sequence[str]) -> None:
        self._inputs, self._shapes, self._absent = inputs, shapes, absent

    def __getattr__(self, name: str) -> Proxy | None:
        if name in self._absent:
            return None
        return self._inputs.placeholder(name, f"w.{name}", shape=self._shapes.get(name), frozen=True)


class _Tables:
    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs

    def __getattr__(self, name: str) -> Proxy:
        return self._inputs.placeholder(name, f't["{name}"]')


class _Inputs:
    """Placeholders of a graph, one per source expression."""

    def __init__(self, graph: Graph) -> None:
        self.tracer = GraphAppendingTracer(graph)
        self.made: dict[str, Proxy] = {}

    def placeholder(self, name: str, source: str, **meta: Any) -> Proxy:
        if source not in self.made:
            proxy = self.tracer.create_proxy("placeholder", name.replace(".", "_"), (), {})
            proxy.node.meta.update(source=source, **meta)
            self.made[source] = proxy
        return self.made[source]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the merged base GEMMs."""
    s = site_shapes(config)
    return {
        "qkv": (s["q_proj"][0] + s["k_proj"][0] + s["v_proj"][0], config.hidden_size),
        "o": s["o_proj"],
        "gate_up": (s["gate_proj"][0] + s["up_proj"][0], config.hidden_size),
        "down": s["down_proj"],
    }


def trace_layer(config: ModelConfig, methods: Sequence[PeftMethod]) -> LayerGraph:
    """The layer's forward graph with every method's bypasses at its sites."""
    graph = Graph()
    inputs = _Inputs(graph)
    shapes, parameters = site_shapes(config), dict[str, Node]()
    absent = [] if config.qkv_bias else ["qkv_bias"]

    def site(name: str, value_in: Proxy, value_out: Proxy) -> Proxy:
        for method in methods:
            if name not in method.sites:
                continue
            bound = {}
            for key, parameter_shape in method.parameters(*shapes[name]).items():
                full = f"{name}.{key}"
                bound[key] = inputs.placeholder(full, f'p["{full}"]', shape=parameter_shape)
                parameters[full] = bound[key].node
            table = inputs.placeholder(method.kind, f't["{method.kind}"]')
            value_out = method.apply(name, value_in, value_out, bound, table)
        return value_out

    x = inputs.placeholder("x", "x", columns=config.hidden_size)
    weights, tables = _Weights(inputs, weight_shapes(config), absent), _Tables(inputs)
    out = decoder_layer(tag("x", x), weights, tables, site, config)
    assert all(s in SITES for m in methods for s in m.sites)
    return LayerGraph(graph, x.node, out.node, parameters)
