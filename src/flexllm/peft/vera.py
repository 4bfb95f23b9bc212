"""VeRA: y + b * (B (d * (A x))), with A and B random, frozen and shared by all layers; two trained vectors per linear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.ops.operators import add, dropout, matmul_nn, matmul_nt, mul_slot, scale_columns, scale_ranks
from flexllm.peft.base import Parameter, PeftMethod, Site, module_name
from flexllm.peft.config import LINEARS, VeraConfig


class Vera(PeftMethod):
    config_type = VeraConfig
    peft_type = "VERA"

    def features(self, config: VeraConfig) -> frozenset[str]:
        return frozenset(config.target_modules) | ({"dropout"} if config.vera_dropout else set())

    def rank(self, config: VeraConfig) -> int:
        return config.r

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        if site not in features:
            return {}
        return {
            "A": Parameter(rank, in_features, trainable=False, shared=True),
            "B": Parameter(rank, out_features, trainable=False, shared=True),
            "d": Parameter(rank, 1),
            "b": Parameter(1, out_features, "slot"),
        }

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        x = dropout(site.x, t["dropout"], t["layer"], LINEARS.index(site.name)) if "dropout" in site.features else site.x
        u = scale_columns(matmul_nt(x, p["A"]), t["mask"])
        u.node.meta.update(names=[f"{site.name}.vera_u"], pooled=site.kind)
        return add(site.y, mul_slot(matmul_nn(scale_ranks(u, p["d"]), p["B"]), p["b"], t["slot"]))

    def initialise(
        self, config: VeraConfig, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """PEFT's: A and B are slices of two Kaiming-uniform matrices that the projection key draws; d constant, b zero."""
        parameter = name.split(".")[-1]
        if parameter == "d":
            tensor.fill_(config.d_initial)
        elif parameter in ("A", "B"):
            widest = [max(shapes[t][side] for t in config.target_modules) for side in (0, 1)]
            a, b = _projections(config.projection_prng_key, config.r, *widest)
            tensor.copy_(a[:, : tensor.shape[1]] if parameter == "A" else b[: tensor.shape[1]].t())

    # ------------------------------------------------------------------------------------------------------------ files
    def write(self, config: VeraConfig, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "peft_type": self.peft_type,
            "r": config.r,
            "target_modules": list(config.target_modules),
            "d_initial": config.d_initial,
            "vera_dropout": config.vera_dropout,
            "projection_prng_key": config.projection_prng_key,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        a = max((v for k, v in tensors.items() if k.endswith(".A")), key=lambda v: v.shape[1])
        b = max((v for k, v in tensors.items() if k.endswith(".B")), key=lambda v: v.shape[1])
        files = {"base_model.vera_A": a, "base_model.vera_B": b.t()}
        for name, tensor in tensors.items():
            _, layer, site, parameter = name.split(".")
            if parameter in ("d", "b"):
                files[f"base_model.model.{module_name(int(layer), site)}.vera_lambda_{parameter}"] = tensor.flatten()
        return settings, files

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[VeraConfig, dict[str, Tensor]]:
        """The projections must be in the file (`save_projection`): their sizes are not elsewhere."""
        rest = dict(tensors)
        try:
            a, b = rest.pop("base_model.vera_A"), rest.pop("base_model.vera_B")
        except KeyError as missing:
            raise ValueError(f"{missing} is missing; save the adapter with save_projection") from None
        if settings.get("bias", "none") != "none":
            raise ValueError(f"bias must be 'none', got {settings['bias']!r}")
        found, targets = {}, set()
        for name, tensor in rest.items():
            match = _NAME.fullmatch(name)
            if match is None or match[2] not in LINEARS:
                raise ValueError(f"{name!r} is no VeRA vector of a supported target ({', '.join(LINEARS)})")
            where = f"layers.{match[1]}.{match[2]}"
            targets.add(match[2])
            found[f"{where}.{match[3]}"] = tensor.reshape(-1, 1) if match[3] == "d" else tensor.reshape(1, -1)
            # How wide a site is, its vector b says for B; A is cut to the model's width when it is loaded.
            found[f"{where}.A"] = a
            if match[3] == "b":
                found[f"{where}.B"] = b[: tensor.numel()].t()
        config = VeraConfig(
            r=settings.get("r", a.shape[0]),
            target_modules=tuple(targets),
            d_initial=settings.get("d_initial", 0.1),
            projection_prng_key=settings.get("projection_prng_key", 0),
        )
        return config, found


_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.vera_lambda_([bd])")


def _projections(key: int, rank: int, widest_out: int, widest_in: int) -> tuple[Tensor, Tensor]:
    """A [r, widest in], B [widest out, r], as PEFT draws them."""
    generator = Generator().manual_seed(key)

    def kaiming(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns).uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)

    return kaiming(rank, widest_in), kaiming(widest_out, rank)
