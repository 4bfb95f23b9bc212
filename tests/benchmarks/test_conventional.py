"""What ordinary autograd keeps: known figures, and that extrapolation, the meta device and checkpointing count what is really kept."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoConfig

import conventional
from conventional import METHODS, SHAPES, _build, _count, conventional_bytes
from flexllm.model.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

TINY = {
    **SHAPES["qwen2.5-14b"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
TOKENS = 48


@pytest.mark.parametrize(
    ("method", "fp32_adapters", "expected"),
    [
        ("lora", False, 184_680),
        ("lora", True, 295_496),
        ("lora-down", False, 168_104),
        ("dora", False, 184_680 + 2 * 2 * 43_008),  # the outputs of each linear and of its adapter, but no weight-sized temporaries
        ("ia3", False, 172_168),
        ("prefix", False, 139_400),
        ("prompt", False, 139_400),
        ("vera", False, 139_400 + 2 * 43_008 + 7 * 2 * 256),
        ("adapter", False, 139_400 + 2 * 2 * (4096 + 64)),
        ("adapter-parallel", False, 139_400 + 2 * 2 * (4096 + 64)),
    ],
)
def test_known_bytes_per_token_and_layer(method: str, fp32_adapters: bool, expected: int) -> None:
    assert conventional_bytes(SHAPES["llama-3.1-8b"], method, 128, fp32_adapters=fp32_adapters).per_token_layer == expected


def test_head_keeps_fp32_probabilities() -> None:
    saved = conventional_bytes(SHAPES["llama-3.1-8b"], "lora", 1000)
    probabilities_and_labels, norm = 4 * 128_256 + 8, 4 * 4096 + 4
    assert saved.head == 1000 * (probabilities_and_labels + norm) + 8 + 4  # a label that is shifted out, and the weight of the mean
    assert saved.total == saved.layers + saved.head


@pytest.mark.parametrize("method", METHODS)
def test_extrapolation_equals_direct_count(method: str) -> None:
    extrapolated = conventional_bytes(TINY, method, TOKENS)
    direct = _count(_build(TINY, method, TINY["num_hidden_layers"], fp32_adapters=False), TOKENS)
    assert (extrapolated.layers, extrapolated.head) == (direct.body, direct.head)


@pytest.mark.parametrize("fp32_adapters", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_meta_device_keeps_what_a_real_one_does(method: str, fp32_adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _count(_build(TINY, method, 2, fp32_adapters), TOKENS)
    monkeypatch.setattr(conventional, "_DEVICE", "cpu")
    assert counted == _count(_build(TINY, method, 2, fp32_adapters), TOKENS)


def test_checkpointing_keeps_layer_inputs_and_one_layer() -> None:
    model = _build(TINY, "lora", TINY["num_hidden_layers"], fp32_adapters=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = _count(model, TOKENS).body
    assert inputs == TINY["num_hidden_layers"] * TOKENS * 2 * TINY["hidden_size"]
    plain, checkpointed = (conventional_bytes(TINY, "lora", TOKENS, checkpointing=flag) for flag in (False, True))
    assert checkpointed.layers - inputs == plain.per_token_layer * TOKENS
    assert checkpointed.head == plain.head


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.55e9), ("qwen2.5-14b", 14.77e9), ("qwen2.5-32b", 32.76e9), ("smollm2-135m", 134.5e6)],
)
def test_shapes_are_complete_configs(shape: str, parameters: float) -> None:
    config = ModelConfig.from_hf(SHAPES[shape])
    assert config.num_parameters == pytest.approx(parameters, rel=1e-3)
    assert config.torch_dtype == "bfloat16"


def test_config_is_a_dict_or_an_object_and_stays_as_it_is() -> None:
    config = SHAPES["llama-3.1-8b"]
    before = copy.deepcopy(config)
    hf = AutoConfig.for_model(**copy.deepcopy(config))
    assert conventional_bytes(config, "lora", 16) == conventional_bytes(hf, "lora", 16)
    assert config == before
    assert hf.num_hidden_layers == 32
