"""What the engine needs to know of a model, read from a Hugging Face config.json. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SUPPORTED = {
    "llama": "LlamaForCausalLM",  # Llama 2, 3, 3.1, 3.2, SmolLM2, ...
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # and Qwen2.5
    "qwen3": "Qwen3ForCausalLM",
}
# What a config.json may leave out, where the families differ (the defaults of transformers' config classes).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder of the Llama kind: RMSNorm, rotary grouped-query attention, SwiGLU."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)  # rope_type linear | llama3, and its numbers
    max_len: int = 2048  # positions; a sliding window bounds it, because within one attention is full
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k before the rotation
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    torch_dtype: str = "float32"  # as stored

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_len")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of K, and of V."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights in the whole model, a tied head counted once."""
        d, hd = self.hidden_size, self.head_dim
        merged = self.q_size + 2 * self.kv_size
        layer = 2 * d + (d + self.qkv_bias) * merged + 2 * hd * self.qk_norm + self.q_size * d + 3 * self.intermediate_size * d
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_hf(cls, source: Path | str | Mapping[str, Any]) -> ModelConfig:
        """Read a model folder (config.json and, if there, generation_config.json), a config.json, or its parsed content.

        Raises ValueError that names the offending key for anything the engine does not compute exactly.
        """
        if isinstance(source, Mapping):
            return cls._from_dict(source, {})
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        generation = path.parent / "generation_config.json"
        return cls._from_dict(_read_json(path), _read_json(generation) if generation.exists() else {})

    @classmethod
    def _from_dict(cls, hf: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        _check_supported(hf)
        family = hf["model_type"]
        values = {**_DEFAULTS[family], **hf}

        def get(key: str) -> Any:
            if values.get(key) is None:
                raise ValueError(f"model config: {key} is missing")
            return values[key]

        heads = get("num_attention_heads")
        rope_theta, rope_scaling = _rope(values)
        max_len = get("max_position_embeddings")
        windowed = family == "mistral" or (family.startswith("qwen") and values.get("use_sliding_window"))
        if windowed and values.get("sliding_window") is not None:
            max_len = min(max_len, values["sliding_window"])
        bos = values.get("bos_token_id")
        return cls(
            model_type=family,
            vocab_size=get("vocab_size"),
            hidden_size=get("hidden_size"),
            intermediate_size=get("intermediate_size"),
            num_layers=get("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or get("hidden_size") // heads,
            rms_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_len=max_len,
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            bos_id=bos if bos is not None else generation.get("bos_token_id"),
            eos_ids=tuple(dict.fromkeys([*_ids(values.get("eos_token_id")), *_ids(generation.get("eos_token_id"))])),
            torch_dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch."),
        )


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotated pair, [head_dim/2] float64.

    theta^(-2i/head_dim), then scaled. `linear` divides all by `factor`. `llama3` (Llama 3.1) leaves wavelengths below
    original/high_freq_factor alone, divides those above original/low_freq_factor, and blends linearly in 1/wavelength between.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def _check_supported(hf: Mapping[str, Any]) -> None:
    """ValueError for a model that the decoder layer would compute wrongly."""
    family, architectures = hf.get("model_type"), hf.get("architectures") or []
    if family not in SUPPORTED or any(a != SUPPORTED[family] for a in architectures):
        name = architectures[0] if architectures else f"model_type {family!r}"
        raise ValueError(f"model architecture {name} is not supported; supported: {', '.join(SUPPORTED.values())}")
    refused = {"mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    if family != "qwen2":  # whose attention_bias, where present, names the q/k/v bias it always has
        refused["attention_bias"] = False
    for key, only in refused.items():
        value = hf.get(key)
        if value is not None and value != only:
            raise ValueError(f"model config: {key}={value!r} is not supported for {SUPPORTED[family]}; supported: {only!r}")


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = {"rope_theta": hf.get("rope_theta"), "partial_rotary_factor": hf.get("partial_rotary_factor")}
    rope |= hf.get("rope_scaling") or {}
    rope |= hf.get("rope_parameters") or {}
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        raise ValueError(f"model config: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; supported: 1")
    theta = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in _ROPE_KEYS:
        raise ValueError(f"model config: rope scaling {kind!r} is not supported; supported: default, {', '.join(_ROPE_KEYS)}")
    missing = [key for key in _ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(f"model config: rope scaling {kind!r} lacks {missing[0]}")
    return theta, {"rope_type": kind, **{key: rope[key] for key in _ROPE_KEYS[kind]}}


def _ids(value: Any) -> list[int]:
    """eos_token_id is an id, a list of ids or null."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
