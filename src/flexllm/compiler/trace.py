"""Trace the decoder layer with its bypass networks into one graph of operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from flexllm.model.config import ModelConfig
from flexllm.model.layer import decoder_layer, site_shapes, tag
from flexllm.peft.base import Binding, Site


@dataclass
class LayerGraph:
    """`source` in a placeholder's meta is the expression that binds it in an emitted function: `w.<weight>`,
    `p["<kind>.<site>.<parameter>"]`, `t["<table>"]`, or a bare name for an argument."""

    graph: Graph
    x: Node
    output: Node
    parameters: dict[str, Node]  # "<site>.<name>" -> placeholder; the trainable ones
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


class _KindTables(Mapping[str, Proxy]):
    """`t["mask"]` is the table of one kind; `t["layer"]` is the batch's own."""

    def __init__(self, inputs: _Inputs, kind: str) -> None:
        self._inputs, self._kind = inputs, kind

    def __getitem__(self, name: str) -> Proxy:
        full = name if name == "layer" else f"{self._kind}.{name}"
        return self._inputs.placeholder(full, f't["{full}"]')

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("tables are known by name alone")

    def __len__(self) -> int:
        raise NotImplementedError("tables are known by name alone")


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


def trace_layer(config: ModelConfig, bindings: Sequence[Binding], first: bool = False) -> LayerGraph:
    """The layer's forward graph with the bypasses of every binding at its sites. `first`: the model's first layer, whose input are
    embeddings."""
    graph = Graph()
    inputs = _Inputs(graph)
    shapes, parameters = site_shapes(config), dict[str, Node]()
    absent = [] if config.qkv_bias else ["qkv_bias"]
    weights, tables = _Weights(inputs, weight_shapes(config), absent), _Tables(inputs)

    def site(name: str, value_in: Proxy, value_out: Proxy) -> Proxy:
        if name == "embedding" and not first:
            return value_out
        base = value_out
        for kind, method, features, rank in bindings:
            bound = {}
            for key, parameter in method.parameters(name, *shapes[name], rank, features).items():
                full = f"{name}.{key}"
                shape, pooled = (parameter.rows, parameter.width), kind if parameter.pooling == "rank" else None
                bound[key] = inputs.placeholder(f"{kind}.{full}", f'p["{kind}.{full}"]', shape=shape, pooled=pooled)
                if parameter.trainable:
                    parameters[full] = bound[key].node
            if bound:
                if value_out is base and "names" not in base.node.meta:
                    tag(f"{name}.base", base)  # a bypass may have to read it
                bias = getattr(weights, f"{name}_bias") if config.qkv_bias and name in ("q_proj", "k_proj", "v_proj") else None
                value_out = method.apply(Site(name, value_in, value_out, bias, kind, features), bound, _KindTables(inputs, kind))
        return value_out

    x = inputs.placeholder("x", "x", columns=config.hidden_size)
    out = decoder_layer(tag("x", x), weights, tables, site, config)
    return LayerGraph(graph, x.node, out.node, parameters)
