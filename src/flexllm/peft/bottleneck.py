"""Bottleneck adapters: up(f(down(z))) added to a sublayer's output; z is that output (serial) or the sublayer's input (parallel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.ops.operators import add, add_ranks, add_slot, matmul_nn, matmul_nt, relu, scale_columns, silu
from flexllm.peft.base import Parameter, PeftMethod, Site, uniform_
from flexllm.peft.config import BottleneckConfig


class Bottleneck(PeftMethod):
    config_type = BottleneckConfig

    def kind(self, config: BottleneckConfig) -> str:
        """Of another shape or activation: another place in the graph."""
        return f"bottleneck_{'parallel' if config.is_parallel else 'serial'}_{config.non_linearity}"

    def features(self, config: BottleneckConfig) -> frozenset[str]:
        return frozenset(config.target_modules) | {config.non_linearity} | ({"parallel"} if config.is_parallel else set())

    def rank(self, config: BottleneckConfig) -> int:
        return config.bottleneck

    def scale(self, config: BottleneckConfig) -> float:
        return config.scaling

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        if site not in features:
            return {}
        return {
            "down": Parameter(rank, in_features),
            "down_bias": Parameter(rank, 1),
            "up": Parameter(rank, out_features),
            "up_bias": Parameter(1, out_features, "slot"),
        }

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        z = site.x if "parallel" in site.features else site.y
        hidden = add_ranks(matmul_nt(z, p["down"]), p["down_bias"])
        hidden.node.meta.update(names=[f"{site.name}.{site.kind}"], pooled=site.kind)
        u = scale_columns((relu if "relu" in site.features else silu)(hidden), t["mask"])
        return add_slot(add(site.y, matmul_nn(u, p["up"])), p["up_bias"], t["slot"])

    def initialise(
        self, config: BottleneckConfig, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """The adapter starts as the identity: up is zero."""
        if name.endswith(".down"):
            uniform_(tensor, tensor.shape[1] ** -0.5, generator)
