from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tests.shapes import LLAMA_8B
from tiny_models import LLAMA3_ROPE, SIZES, tiny_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexllm.model.config import ModelConfig, rope_frequencies


def test_reads_a_llama_3_config() -> None:
    config = ModelConfig.from_hf(LLAMA_8B)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (32, 32, 8, 128)
    assert (config.q_size, config.kv_size) == (4096, 1024)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.bos_id == 128000
    assert (config.rope_theta, config.rope_scaling, config.max_len) == (500000.0, None, 131072)
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (False, False, False)
    assert config.torch_dtype == "bfloat16"
    assert config.num_parameters == 8_030_261_248  # the model card's 8.03B


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = ModelConfig.from_hf(LLAMA_8B | {"rope_scaling": LLAMA3_ROPE})
    new = {k: v for k, v in LLAMA_8B.items() if k != "rope_theta"} | {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
    assert ModelConfig.from_hf(new) == old
    assert old.rope_scaling == LLAMA3_ROPE
    legacy = ModelConfig.from_hf(LLAMA_8B | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert legacy.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "qkv_bias", "qk_norm"), [("llama", False, False), ("mistral", False, False), ("qwen2", True, False), ("qwen3", False, True)]
)
def test_reads_what_transformers_writes(tmp_path: Path, family: str, qkv_bias: bool, qk_norm: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=True, rope_theta=5000.0)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    assert config.model_type == family
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    assert (config.qkv_bias, config.qk_norm, config.tie_embeddings) == (qkv_bias, qk_norm, True)
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.head_dim == (16 if family == "qwen3" else 8)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_left_out_keys_default_as_in_transformers(family: str) -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {k: SIZES[k] for k in required} | {"num_attention_heads": 32, "hidden_size": 256}
    oracle = transformers.AutoConfig.for_model(family, **sizes)
    config = ModelConfig.from_hf({"model_type": family, **sizes})
    assert config.num_kv_heads == oracle.num_key_value_heads
    assert config.head_dim == (getattr(oracle, "head_dim", None) or 8)
    assert config.rms_eps == oracle.rms_norm_eps
    assert config.rope_theta == oracle.rope_parameters["rope_theta"]
    window = oracle.sliding_window if family == "mistral" else None
    assert config.max_len == min(oracle.max_position_embeddings, window or oracle.max_position_embeddings)


@pytest.mark.parametrize(
    ("changes", "max_len"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 131072),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 131072),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, 4096),
    ],
)
def test_a_sliding_window_bounds_the_context(changes: dict[str, Any], max_len: int) -> None:
    assert ModelConfig.from_hf(LLAMA_8B | {"architectures": None} | changes).max_len == max_len


def test_eos_ids_are_those_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert ModelConfig.from_hf(tmp_path).eos_ids == (7, 9)
    assert ModelConfig.from_hf(tmp_path / "config.json").eos_ids == (7, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported.*LlamaForCausalLM.*Qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope scaling 'yarn' is not supported; supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"num_key_value_heads": 5}, "32 heads cannot share 5"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA_8B | changes)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3_ROPE, LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192}],
)
def test_rope_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    rope = {"rope_theta": 500000.0, "rope_type": "default"} | (scaling or {})
    oracle = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    if scaling is None:
        expected = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    else:
        expected = ROPE_INIT_FUNCTIONS[rope["rope_type"]](oracle, "cpu")[0].double().numpy()
    ours = rope_frequencies(ModelConfig.from_hf(oracle.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    assert ours.dtype == np.float64
    assert ours.shape == (64,)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
