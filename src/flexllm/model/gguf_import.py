"""GGUF files as Hugging Face folders: weights dequantized to bf16 safetensors, config.json, tokenizer.json, chat template.

Reading and dequantizing are the `gguf` package's; this file knows the names and the row order, gguf_tokenizer.py the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.torch import save_file

from flexllm.config import cache_dir
from flexllm.model.config import ModelConfig, rope_frequencies
from flexllm.model.gguf_tokenizer import build_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHARD_BYTES = 4 << 30  # the most that is held in memory at once

# GGUF name -> Hugging Face name; {} is the layer
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, as divisors of the frequencies


def converted(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, converted at first use. Raises ValueError on what cannot be converted."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    stat = path.stat()
    version = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return build_once(cache_dir() / "models" / f"{path.stem}-{version}", lambda out: import_gguf(path, out))


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(temporary folder)` if it does not exist.

    The temporary folder is renamed into place when complete, so `folder` is never seen half made; of two processes that
    build at once the later one drops its copy.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        build(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def import_gguf(path: Path, out: Path) -> None:
    """Write `path` as a Hugging Face folder `out` (made if missing). Raises ValueError on what cannot be converted."""
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    out.mkdir(parents=True, exist_ok=True)
    config = hf_config(meta, reader.tensors)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id") if k in config})
    tokenizer, settings = build_tokenizer(meta)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", {**settings, "model_max_length": config["max_position_embeddings"]})
    _write_weights(reader.tensors, config, out)


def hf_config(meta: dict[str, Any], tensors: list[ReaderTensor]) -> dict[str, Any]:
    """config.json's content from GGUF metadata."""
    arch = meta["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"GGUF metadata lacks {arch}.{key}")
        return value

    if get("expert_count", 0):
        raise ValueError(f"GGUF model has {get('expert_count')} experts; only dense models are supported")
    shapes = {t.name: t.shape for t in tensors}  # GGUF lists the fastest dimension first
    heads, hidden = get("attention.head_count"), get("embedding_length")
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": int(shapes["token_embd.weight"][1]) if "token_embd.weight" in shapes else len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32: 9.9999997e-06 is 1e-05
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    }
    scaling = _rope_scaling(meta, tensors, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        if (token := meta.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _rope_scaling(meta: dict[str, Any], tensors: list[ReaderTensor], config: dict[str, Any]) -> dict[str, Any] | None:
    """GGUF keeps Llama 3.1's scaling as its result, one divisor per frequency; find the parameters that give it."""
    arch = config["model_type"]
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta[f"{arch}.rope.scaling.factor"]}
    if kind != "none":
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported; supported: none, linear, llama3")
    stored = next((t for t in tensors if t.name == _ROPE_FACTORS), None)
    if stored is None:
        return None
    divisors = dequantize(stored.data, stored.tensor_type).astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = rope_frequencies(ModelConfig.from_hf(config))
    scaled = rope_frequencies(ModelConfig.from_hf({**config, "rope_scaling": scaling}))
    if divisors.shape != plain.shape or not np.allclose(plain / divisors, scaled, rtol=1e-3):
        raise ValueError("GGUF rope_freqs.weight holds a rope scaling other than Llama 3.1's, which is not supported")
    return scaling


# ---------------------------------------------------------------------------------------------------------- weights
def _write_weights(tensors: list[ReaderTensor], config: dict[str, Any], out: Path) -> None:
    shards = list(_shards([t for t in tensors if t.name != _ROPE_FACTORS]))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        state = {_hf_name(t.name): _dequantized(t, config) for t in shard}
        save_file(state, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    if len(shards) > 1:
        _write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(tensors: list[ReaderTensor]) -> Iterator[list[ReaderTensor]]:
    shard: list[ReaderTensor] = []
    size = 0
    for tensor in tensors:
        nbytes = 2 * int(tensor.n_elements)
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += nbytes
    yield shard


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")  # blk.<layer>.<part>.<weight|bias>
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _BLOCK:
        raise ValueError(f"GGUF tensor {name!r} has no place in a {'/'.join(ARCHITECTURES)} model")
    return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"


def _dequantized(tensor: ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"GGUF tensor {tensor.name!r}: quantization {tensor.tensor_type.name} is not supported") from error
    if config["model_type"] == "llama" and tensor.name.rsplit(".", 2)[-2] in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"]
        values = _halves_from_pairs(values, heads)
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)  # F32 tensors are views of the file


def _halves_from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's llama rotates neighbouring rows (0,1),(2,3)...; Hugging Face rotates row i with row i + head_dim/2."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
