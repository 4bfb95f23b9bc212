"""Prefix and prompt tuning: virtual tokens before the prompt. They are rows of the batch like any other; a site puts the trained
values in the place of what those rows computed: their keys and values in every layer (prefix), or their embeddings (prompt)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.ops.operators import replace_rows
from flexllm.peft.base import Parameter, PeftMethod, Site
from flexllm.peft.config import PrefixConfig, PromptConfig

EMBEDDINGS = "prompt_embeddings"  # the one tensor of PEFT's files


class _VirtualTokens(PeftMethod):
    def rank(self, config: PrefixConfig | PromptConfig) -> int:
        return config.num_virtual_tokens

    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        return {"tokens": Parameter(rank, out_features)} if site in features else {}

    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        return replace_rows(site.y, p["tokens"], t["rows"])

    def initialise(self, config: Any, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]) -> None:
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(std=self._spread, generator=generator))

    _spread = 1.0


class PrefixTuning(_VirtualTokens):
    config_type = PrefixConfig
    peft_type = "PREFIX_TUNING"

    def write(self, config: PrefixConfig, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = _settings(self.peft_type, config.num_virtual_tokens, model) | {
            "token_dim": model.num_kv_heads * model.head_dim,
            "num_attention_heads": model.num_kv_heads,
            "prefix_projection": False,
        }
        parts = [tensors[f"layers.{i}.{site}.tokens"] for i in range(model.num_layers) for site in ("key", "value")]
        return settings, {EMBEDDINGS: torch.cat(parts, dim=1)}

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PrefixConfig, dict[str, Tensor]]:
        table = _only(tensors)
        layers = int(settings.get("num_layers") or 0)
        if layers < 1 or table.shape[1] % (2 * layers):
            raise ValueError(f"{EMBEDDINGS} {list(table.shape)} does not divide into num_layers {layers} keys and values")
        parts = table.chunk(2 * layers, dim=1)  # key, value, key, value, ...
        found = {f"layers.{i // 2}.{('key', 'value')[i % 2]}.tokens": part for i, part in enumerate(parts)}
        return PrefixConfig(num_virtual_tokens=table.shape[0]), found


class PromptTuning(_VirtualTokens):
    config_type = PromptConfig
    peft_type = "PROMPT_TUNING"
    _spread = 0.02

    def write(self, config: PromptConfig, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = _settings(self.peft_type, config.num_virtual_tokens, model) | {
            "token_dim": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "prompt_tuning_init": "RANDOM",
        }
        return settings, {EMBEDDINGS: tensors["layers.0.embedding.tokens"]}

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PromptConfig, dict[str, Tensor]]:
        table = _only(tensors)
        return PromptConfig(num_virtual_tokens=table.shape[0]), {"layers.0.embedding.tokens": table}


def _settings(peft_type: str, tokens: int, model: ModelConfig) -> dict[str, Any]:
    return {
        "peft_type": peft_type,
        "num_virtual_tokens": tokens,
        "num_layers": model.num_layers,
        "num_transformer_submodules": 1,
    }


def _only(tensors: Mapping[str, Tensor]) -> Tensor:
    if set(tensors) != {EMBEDDINGS} or tensors[EMBEDDINGS].ndim != 2:
        raise ValueError(f"must hold one matrix, {EMBEDDINGS}; it has {', '.join(sorted(tensors))}")
    return tensors[EMBEDDINGS]
