from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE

from flexllm.model import hub
from flexllm.model.config import ModelConfig
from flexllm.model.loader import ModelWeights, default_dtype, load_weights, random_weights, resolve_model

SaveTiny = Callable[..., tuple[Any, Path]]


def assert_equals_state(weights: ModelWeights, config: ModelConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every tensor is the checkpoint's, merged as documented."""

    def expect(ours: torch.Tensor, *names: str) -> None:
        theirs = torch.cat([state[n] for n in names]).to(dtype)
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)

    expect(weights.embed, "model.embed_tokens.weight")
    expect(weights.final_norm, "model.norm.weight")
    assert (weights.lm_head is weights.embed) == config.tie_embeddings
    expect(weights.lm_head, "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight")
    for i, layer in enumerate(weights.layers):
        p = f"model.layers.{i}."
        expect(layer.input_norm, p + "input_layernorm.weight")
        expect(layer.qkv, *(f"{p}self_attn.{x}_proj.weight" for x in "qkv"))
        expect(layer.o, p + "self_attn.o_proj.weight")
        expect(layer.post_norm, p + "post_attention_layernorm.weight")
        expect(layer.gate_up, p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight")
        expect(layer.down, p + "mlp.down_proj.weight")
        assert (layer.qkv_bias is not None) == config.qkv_bias
        if layer.qkv_bias is not None:
            expect(layer.qkv_bias, *(f"{p}self_attn.{x}_proj.bias" for x in "qkv"))
        assert (layer.q_norm is not None) == (layer.k_norm is not None) == config.qk_norm
        if layer.q_norm is not None and layer.k_norm is not None:
            expect(layer.q_norm, p + "self_attn.q_norm.weight")
            expect(layer.k_norm, p + "self_attn.k_norm.weight")


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3_ROPE}, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_loads_what_transformers_saved(save_tiny: SaveTiny, family: str, overrides: dict[str, Any], shard_size: str) -> None:
    model, folder = save_tiny(family, max_shard_size=shard_size, **overrides)
    assert (len(hub.weight_files(folder)) > 1) == (shard_size == "20KB")
    assert resolve_model(str(folder)) == folder
    config = ModelConfig.from_hf(folder)
    weights = load_weights(folder, config, torch.float32, "cpu")
    assert_equals_state(weights, config, model.state_dict(), torch.float32)
    assert weights.nbytes == 4 * config.num_parameters


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float64])
def test_converts_dtypes(save_tiny: SaveTiny, stored: torch.dtype, wanted: torch.dtype) -> None:
    model, folder = save_tiny("llama", dtype=stored)
    config = ModelConfig.from_hf(folder)
    assert config.torch_dtype == str(stored).removeprefix("torch.")
    assert_equals_state(load_weights(folder, config, wanted, "cpu"), config, model.state_dict(), wanted)


def test_default_dtype_keeps_stored_float32(save_tiny: SaveTiny) -> None:
    _, folder = save_tiny("llama")
    assert default_dtype(ModelConfig.from_hf(folder), "cpu") == torch.float32
    _, folder = save_tiny("llama", dtype=torch.bfloat16)
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert default_dtype(ModelConfig.from_hf(folder), "cpu") == (torch.bfloat16 if has_bf16 else torch.float32)


def test_random_weights_have_the_shapes_of_real_ones_and_obey_the_seed(save_tiny: SaveTiny) -> None:
    _, folder = save_tiny("qwen2", tie_word_embeddings=True)
    config = ModelConfig.from_hf(folder)
    real = load_weights(folder, config, torch.float32, "cpu")
    a, b, c = (random_weights(config, torch.float32, "cpu", seed=seed) for seed in (1, 1, 2))
    assert [t.shape for t in a.tensors()] == [t.shape for t in real.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert not torch.equal(a.embed, c.embed)
    assert a.lm_head is a.embed
    assert a.final_norm.eq(1).all()


def load(folder: Path) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_hf(folder), torch.float32, "cpu")


def test_a_truncated_file_is_named(save_tiny: SaveTiny) -> None:
    _, folder = save_tiny("llama", max_shard_size="20KB")
    victim = hub.weight_files(folder)[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{victim.name}: cannot be read as safetensors"):
        load(folder)
    victim.write_bytes(b"")
    with pytest.raises(ValueError, match=victim.name):
        load(folder)
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing"):
        resolve_model(str(folder))
    with pytest.raises(ValueError, match=victim.name):
        load(folder)


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(save_tiny: SaveTiny) -> None:
    _, folder = save_tiny("llama")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        load(folder)
    save_file(state | {name: state[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} has shape \[15, 32\], expected \[16, 32\]"):
        load(folder)
    save_file(state | {name: state[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is stored as torch\.int8"):
        load(folder)


def test_folders_that_are_no_models_are_refused(save_tiny: SaveTiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model("./nowhere")
    with pytest.raises(ValueError, match=r"gone\.gguf: no such file"):
        resolve_model(str(tmp_path / "gone.gguf"))
    _, folder = save_tiny("llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        resolve_model(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors"):
        resolve_model(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="its own folder"):
        resolve_model(str(folder))


# ---------------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, repo_id: str, folder: Path) -> Path:
    """Lay `folder` out as the hub's client caches it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    return snapshot


def test_without_network_a_hub_id_comes_from_the_cache(save_tiny: SaveTiny, hub_cache: Path) -> None:
    _, folder = save_tiny("llama")
    snapshot = put_in_cache(hub_cache, "someone/tiny", folder)
    assert resolve_model("someone/tiny") == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="someone/tiny"):
        resolve_model("someone/tiny")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_that_is_nowhere_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"'someone/else' is neither a local folder, nor available .*offline"):
        resolve_model("someone/else")


def test_a_hub_that_does_not_answer_costs_the_timeout_and_no_more(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    import threading
    import time

    never = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_args, **_kwargs: never.wait(30))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer within 0\.2 s"):
        hub.snapshot("someone/else", timeout=0.2)
    assert time.monotonic() - start < 5
    never.set()
    assert not hub_cache.exists()
