"""What a PEFT method is to the rest of the engine: parameters at sites, and a function written in operators.

A method has no backward of its own; the compiler differentiates `apply`. The same `apply` serves two bindings:
the fused forward passes pooled parameters (all resident adapters side by side, a per-row table selecting the owner's
share), a job's backward passes that job's own slice (and a constant in place of the table).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.fx import Proxy


class PeftMethod(Protocol):
    @property
    def kind(self) -> str:
        """Names its per-row table."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it attaches to."""
        ...

    def parameters(self, out_features: int, in_features: int) -> Mapping[str, tuple[int, int]]:
        """Name -> shape of the parameters at a site whose base linear is [out, in]."""
        ...

    def apply(self, site: str, x: Proxy, y: Proxy, parameters: Mapping[str, Proxy], table: Any) -> Proxy:
        """x: input of the base linear, y: its output (with the bypasses applied before this one). Returns the new output."""
        ...
