"""LoRA: y + scale * B(A x), for a mixed batch as two dense GEMMs with a rank mask (algorithms.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Proxy

from flexllm.ops.operators import add, matmul_nn, matmul_nt, scale_columns


@dataclass(frozen=True)
class Lora:
    """A [r, in] as PEFT stores it; B is kept transposed, [r, out], so that an adapter is a run of rows in both."""

    sites: tuple[str, ...]
    rank: int
    kind: str = "lora"

    def parameters(self, out_features: int, in_features: int) -> Mapping[str, tuple[int, int]]:
        return {"A": (self.rank, in_features), "B": (self.rank, out_features)}

    def apply(self, site: str, x: Proxy, y: Proxy, parameters: Mapping[str, Proxy], table: Any) -> Proxy:
        u = scale_columns(matmul_nt(x, parameters["A"]), table)
        u.node.meta.update(names=[f"{site}.lora_u"], pooled=True)
        return add(y, matmul_nn(u, parameters["B"]))
