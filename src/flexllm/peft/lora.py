"""LoRA: y + scale * B(A x), for a mixed batch as two dense GEMMs with a rank mask (algorithms.md section 5); with DoRA.

A [r, in] as PEFT stores it; B is kept transposed, [r, out], so that an adapter is a run of rows in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.ops.operators import add, add_bias, dropout, matmul_nn, matmul_nt, mul_slot, scale_columns, scale_ranks
from flexllm.peft.base import Parameter, PeftMethod, Site, module_name, refuse, uniform_
from flexllm.peft.config import LINEARS, LoraConfig, peft_config


class Lora(PeftMethod):
    config_type = LoraConfig
    peft_type = "LORA"

    def features(self, config: LoraConfig) -> frozenset[str]:
        """`gain`: the scale differs between modules; `dora`; `dropout`."""
        flags = {"gain": bool(config.rank_pattern or config.alpha_pattern), "dora": config.use_dora, "dropout": config.lora_dropout > 0}
        return frozenset(config.target_modules) | {name for name, on in flags.items() if on}

    def rank(self, config: LoraConfig) -> int:
        return config.max_rank  # where a pattern says less, the last rows stay zero: so do their gradients

    def scale(self, config: LoraConfig) -> float:
        return config.scale

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        if site not in features:
            return {}
        found = {"A": Parameter(rank, in_features), "B": Parameter(rank, out_features)}
        if "gain" in features:
            found["gain"] = Parameter(rank, 1, neutral=1.0, trainable=False)
        if "dora" in features:
            found["magnitude"] = Parameter(1, out_features, "slot", neutral=1.0)
            found["inverse_norm"] = Parameter(1, out_features, "slot", neutral=1.0, trainable=False)
        return found

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        x = dropout(site.x, t["dropout"], t["layer"], LINEARS.index(site.name)) if "dropout" in site.features else site.x
        u = scale_columns(matmul_nt(x, p["A"]), t["mask"])
        if "gain" in site.features:
            u = scale_ranks(u, p["gain"])
        u.node.meta.update(names=[f"{site.name}.lora_u"], pooled=site.kind)
        if "dora" not in site.features:
            return add(site.y, matmul_nn(u, p["B"]))
        # DoRA: magnitude * (W + scale B A) x / |W + scale B A|, the norm a constant to the gradient as in PEFT; a bias stays out of it
        y = site.y if site.bias is None else add_bias(site.y, site.bias, -1)
        y = mul_slot(add(y, matmul_nn(u, p["B"])), p["inverse_norm"], t["slot"])
        y = mul_slot(y, p["magnitude"], t["slot"])
        return y if site.bias is None else add_bias(y, site.bias, 1)

    def initialise(
        self, config: LoraConfig, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """PEFT's: A uniform in +-1/sqrt(in), B zero (and DoRA's magnitude the norm of the base weight: see `refresh`)."""
        layer, site, parameter = name.split(".")
        if parameter == "A":
            rank = config.rank_at(module_name(int(layer), site))
            uniform_(tensor[:rank], 1 / math.sqrt(tensor.shape[1]), generator)
        elif parameter == "gain":
            tensor[:] = config.scale_at(module_name(int(layer), site)) / config.scale
        elif parameter == "magnitude":
            tensor.zero_()

    def needs_refresh(self, config: LoraConfig) -> bool:
        return config.use_dora

    def refresh(self, config: LoraConfig, layer: int, site: str, p: Mapping[str, Tensor], base: Tensor, squares: Tensor) -> None:
        """1 / |W + scale B A| of each output, without ever forming the sum."""
        scale = config.scale_at(module_name(layer, site))
        cross = (base @ p["A"].t()).to(squares.dtype)  # [out, r]
        a, b = p["A"].to(squares.dtype), p["B"].to(squares.dtype)
        merged = squares + 2 * scale * (cross * b.t()).sum(1) + scale**2 * ((a @ a.t()) @ b).mul_(b).sum(0)
        norm = merged.clamp_min_(0).sqrt_()
        if not p["magnitude"].any():  # a fresh adapter
            p["magnitude"].copy_(norm[None])
        p["inverse_norm"].copy_(1 / norm[None])

    # ------------------------------------------------------------------------------------------------------------ files
    def write(self, config: LoraConfig, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        alpha = config.lora_alpha
        settings = {
            "peft_type": self.peft_type,
            "r": config.r,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": config.lora_dropout,
            "target_modules": list(config.target_modules),
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": dict(config.alpha_pattern),
            "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
        files = {}
        for name, tensor in tensors.items():
            _, layer, site, parameter = name.split(".")
            module = module_name(int(layer), site)
            rank = config.rank_at(module)
            if parameter == "A":
                files[f"base_model.model.{module}.lora_A.weight"] = tensor[:rank]
            elif parameter == "B":
                files[f"base_model.model.{module}.lora_B.weight"] = tensor[:rank].t()
            elif parameter == "magnitude":
                files[f"base_model.model.{module}.lora_magnitude_vector"] = tensor[0]
        return settings, files

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The config's targets are those the file has tensors for. Dropout is a matter of training and is not kept."""
        refuse(settings, _UNSUPPORTED)
        if settings.get("bias", "none") != "none":
            raise ValueError(f"bias must be 'none', got {settings['bias']!r}")
        if settings.get("init_lora_weights") not in _INITS:
            init = settings["init_lora_weights"]
            raise ValueError(f"init_lora_weights {init!r} changes the base weights; convert the adapter to plain LoRA")
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None or not name.startswith(f"base_model.model.{module_name(int(match[1]), match[2])}."):
                raise ValueError(f"{name!r} is no LoRA matrix of a supported target ({', '.join(LINEARS)})")
            found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
        targets = {site for _, site in found}
        values = {
            "type": "lora",
            "r": settings.get("r", 8),
            "lora_alpha": settings.get("lora_alpha", 8),
            "target_modules": tuple(t for t in LINEARS if t in targets),
            "use_rslora": bool(settings.get("use_rslora", False)),
            "use_dora": bool(settings.get("use_dora", False)),
            "rank_pattern": settings.get("rank_pattern") or {},
            "alpha_pattern": settings.get("alpha_pattern") or {},
            "layers_to_transform": _layers(settings),
        }
        config = peft_config(values)
        assert isinstance(config, LoraConfig)
        return config, {k: v for key, parts in sorted(found.items()) for k, v in self._pooled(config, *key, parts).items()}

    def _pooled(self, config: LoraConfig, layer: int, site: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One module's tensors as the engine has them. ValueError for tensors that are missing or of another rank."""
        module = module_name(layer, site)
        where, rank = f"layers.{layer}.{site}", config.rank_at(module)
        for half, other in (("A", "B"), ("B", "A")):
            if f"lora_{half}.weight" not in parts:
                raise ValueError(f"{where} has lora_{other} only")
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but the settings say rank {rank}")
        rows = config.max_rank - rank
        pad = torch.nn.functional.pad
        pooled = {f"{where}.A": pad(a, (0, 0, 0, rows)), f"{where}.B": pad(b.t(), (0, 0, 0, rows))}
        if "gain" in self.features(config):
            pooled[f"{where}.gain"] = torch.full((config.max_rank, 1), config.scale_at(module) / config.scale)
        if config.use_dora:
            if "lora_magnitude_vector" not in parts:
                raise ValueError(f"{where} has no lora_magnitude_vector")
            pooled[f"{where}.magnitude"] = parts["lora_magnitude_vector"].reshape(1, -1)
        return pooled


_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.(lora_[AB]\.weight|lora_magnitude_vector)")
# Settings that change what an adapter computes, and that are not implemented: each must be absent, null, false or empty.
_UNSUPPORTED = (
    "lora_bias",
    "layer_replication",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initializations that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) train against changed ones.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def _layers(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    chosen = settings.get("layers_to_transform")
    return None if chosen is None else (chosen,) if isinstance(chosen, int) else tuple(chosen)
