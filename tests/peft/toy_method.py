"""A method that nobody has: gate * (y + scale * B relu(A x)), a low-rank branch that bends, and a gate on each output.

This file is all there is of it: the compiler differentiates `apply`, the pool holds the parameters, files and wire take the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.ops.operators import add, matmul_nn, matmul_nt, mul_slot, relu, scale_columns
from flexllm.peft.base import Parameter, PeftMethod, Site, uniform_
from flexllm.peft.config import PeftConfig


@dataclass(frozen=True)
class ToyConfig(PeftConfig):
    type: str = field(default="toy", init=False)

    r: int = 4
    scaling: float = 1.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")

    def __post_init__(self) -> None:
        self._check_targets()


class Toy(PeftMethod):
    config_type = ToyConfig

    def rank(self, config: ToyConfig) -> int:
        return config.r

    def scale(self, config: ToyConfig) -> float:
        return config.scaling

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        if site not in features:
            return {}
        gate = Parameter(1, out_features, "slot", neutral=1.0)
        return {"A": Parameter(rank, in_features), "B": Parameter(rank, out_features), "gate": gate}

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        hidden = matmul_nt(site.x, p["A"])
        hidden.node.meta.update(names=[f"{site.name}.toy"], pooled=site.kind)  # so that it can be saved
        u = scale_columns(relu(hidden), t["mask"])
        return mul_slot(add(site.y, matmul_nn(u, p["B"])), p["gate"], t["slot"])

    def initialise(self, config: ToyConfig, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]) -> None:
        if name.endswith(".A"):  # B stays zero, the gate one: a fresh adapter is the base model
            uniform_(tensor, tensor.shape[1] ** -0.5, generator)
