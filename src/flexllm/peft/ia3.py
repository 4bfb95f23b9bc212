"""(IA)^3: outputs (keys, values) and the inputs of the feed-forward's last linear, scaled elementwise by trained vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.ops.operators import mul_slot
from flexllm.peft.base import Parameter, PeftMethod, Site, module_name
from flexllm.peft.config import LINEARS, Ia3Config


class Ia3(PeftMethod):
    config_type = Ia3Config
    peft_type = "IA3"

    def features(self, config: Ia3Config) -> frozenset[str]:
        """A feed-forward target is scaled at its input's site."""
        return frozenset(f"{t}_in" if t in config.feedforward_modules else t for t in config.target_modules)

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        return {"l": Parameter(1, out_features, "slot", neutral=1.0)} if site in features else {}

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        return mul_slot(site.y, p["l"], t["slot"])

    # ------------------------------------------------------------------------------------------------------------ files
    def write(self, config: Ia3Config, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "peft_type": self.peft_type,
            "target_modules": list(config.target_modules),
            "feedforward_modules": list(config.feedforward_modules),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }
        files = {}
        for name, tensor in tensors.items():
            _, layer, site, _ = name.split(".")
            module = module_name(int(layer), site.removesuffix("_in"))
            files[f"base_model.model.{module}.ia3_l"] = tensor if site.endswith("_in") else tensor.t()
        return settings, files

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Ia3Config, dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        feedforward: set[str] = set()
        plain: set[str] = set()
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None or match[2] not in LINEARS:
                raise ValueError(f"{name!r} is no (IA)^3 vector of a supported target ({', '.join(LINEARS)})")
            inner = tensor.shape[0] == 1
            (feedforward if inner else plain).add(match[2])
            found[f"layers.{match[1]}.{match[2]}{'_in' if inner else ''}.l"] = tensor.reshape(1, -1)
        return Ia3Config(target_modules=tuple(feedforward | plain), feedforward_modules=tuple(feedforward)), found


_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.ia3_l")
