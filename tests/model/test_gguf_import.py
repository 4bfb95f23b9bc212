from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import TokenType
from tiny_gguf import gguf_model, write_gguf
from tiny_models import CORPUS, LLAMA3_ROPE, byte_fallback_tokenizer, byte_level_tokenizer
from transformers import AutoModelForCausalLM

from flexllm.model import gguf_import
from flexllm.model.config import ModelConfig, rope_frequencies
from flexllm.model.gguf_import import build_once, import_gguf
from flexllm.model.gguf_tokenizer import build_tokenizer
from flexllm.model.loader import load_weights, resolve_model
from flexllm.model.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen2", {"rms_norm_eps": 1e-5}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    model = gguf_model(family, **overrides)
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = ModelConfig.from_hf(tmp_path / "out")
    assert config.torch_dtype == "bfloat16"
    assert config.rms_eps == model.config.rms_norm_eps
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    load_weights(tmp_path / "out", config, torch.float32, "cpu")


def test_row_order_and_dequantization_are_those_of_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"), quantize=True)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "SHARD_BYTES", 8000)
    model = gguf_model("qwen2")
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    config = ModelConfig.from_hf(tmp_path / "out")
    weights = load_weights(tmp_path / "out", config, torch.bfloat16, "cpu")
    assert torch.equal(weights.layers[1].down, model.state_dict()["model.layers.1.mlp.down_proj.weight"])


def test_llama3_rope_scaling_is_recognized_from_its_divisors(tmp_path: Path) -> None:
    scaling = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    model = gguf_model("llama", rope_parameters={"rope_theta": 500000.0, **scaling})
    config = ModelConfig.from_hf(model.config.to_dict() | {"architectures": None})
    plain = 500000.0 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    write_gguf(tmp_path / "m.gguf", model, rope_freqs=plain / rope_frequencies(config))
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert ModelConfig.from_hf(tmp_path / "out").rope_scaling == scaling
    write_gguf(tmp_path / "odd.gguf", model, rope_freqs=np.array([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        import_gguf(tmp_path / "odd.gguf", tmp_path / "odd")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_the_tokenizer_round_trips(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"), pre=pre, add_bos=pre == "llama-bpe")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer(tmp_path / "out")
    for text in CORPUS:
        assert ours.decode(ours.encode(text)) == text
    if pre == "smollm":
        assert [ours.encode(t) for t in CORPUS] == [byte_level_tokenizer().encode(t).ids for t in CORPUS]
    assert ours.encode("<|im_start|>a<|im_end|>") == [1, *ours.encode("a"), 2]
    assert ours.encode("a", add_special=True) == ([1] if pre == "llama-bpe" else []) + ours.encode("a")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True) == ours.encode(text)
    assert ours.eos_ids == (2,)


def test_a_sentencepiece_tokenizer_round_trips() -> None:
    oracle = byte_fallback_tokenizer()
    pieces = [t for t, _ in sorted(oracle.get_vocab().items(), key=lambda item: item[1])]
    fixed = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [fixed.get(p, TokenType.BYTE if p.startswith("<0x") else TokenType.NORMAL) for p in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    ours, settings = build_tokenizer(meta)
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    for text in ("ab a  bab é中", " a", "", "cab</s>a"):
        assert ours.encode(text, add_special_tokens=False).ids == oracle.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == oracle.decode(oracle.encode(text).ids)
    assert ours.encode("a").tokens == ["<s>", "▁a"]


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = gguf_model("llama")
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"m\.gguf: not a readable GGUF file"):
        import_gguf(path, tmp_path / "out")
    write_gguf(path, model)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"m\.gguf: not a readable GGUF file"):
        import_gguf(path, tmp_path / "out")
    write_gguf(path, model, kind="bert")
    with pytest.raises(ValueError, match=r"GGUF tokenizer 'bert'/'smollm' is not supported; supported: llama, gpt2 with"):
        import_gguf(path, tmp_path / "out")
    model.config.model_type = "gemma"
    write_gguf(path, model)
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported; supported: llama, qwen2, qwen3"):
        import_gguf(path, tmp_path / "out")


def test_a_gguf_file_is_converted_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXLLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_model("llama"))
    folder = resolve_model(str(path))
    assert folder.is_relative_to(tmp_path / "cache")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    write_gguf(path, gguf_model("llama", num_hidden_layers=1))
    again = resolve_model(str(path))
    assert ModelConfig.from_hf(again).num_layers == 1
    assert sorted(p.name for p in again.parent.iterdir()) == sorted([folder.name, again.name])  # no leftovers


def test_two_builders_at_once_both_succeed(tmp_path: Path) -> None:
    both_build = threading.Barrier(2)
    results: list[Path] = []

    def build(out: Path) -> None:
        both_build.wait(10)
        (out / "file").write_text("whole")

    threads = [threading.Thread(target=lambda: results.append(build_once(tmp_path / "model", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "model"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(out: Path) -> None:
        (out / "half").write_text("")
        raise ValueError("full disk")

    with pytest.raises(ValueError, match="full disk"):
        build_once(tmp_path / "model", build)
    assert list(tmp_path.iterdir()) == []
