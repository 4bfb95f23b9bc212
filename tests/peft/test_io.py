"""Adapter files against PEFT itself: what it writes is read here, what is written here it reads, with the same numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from flexllm.files import StorageError
from flexllm.model.config import ModelConfig
from flexllm.peft.config import LINEARS, LoraConfig
from flexllm.peft.io import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, load_adapter, save_adapter
from tests.finetune.test_checkpoint import file_size_limit

IDS = torch.tensor([[0, 40, 41, 42, 43, 1]])


@pytest.fixture
def base(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture
def model_config(tiny_llama: Path) -> ModelConfig:
    return ModelConfig.from_hf(tiny_llama)


def random_peft(base: LlamaForCausalLM, **settings: Any) -> peft.PeftModel:
    """A PEFT model whose B matrices are not zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def random_adapter(config: ModelConfig, lora: LoraConfig) -> AdapterFile:
    from flexllm.model.layer import site_shapes

    torch.manual_seed(2)
    shapes = site_shapes(config)
    tensors = {}
    for layer in range(config.num_layers):
        for t in lora.target_modules:
            tensors[f"layers.{layer}.{t}.A"] = torch.randn(lora.r, shapes[t][1])
            tensors[f"layers.{layer}.{t}.B"] = torch.randn(lora.r, shapes[t][0])
    return AdapterFile(lora, "some/base", tensors)


def merged_logits(folder: Path, adapter: AdapterFile) -> Tensor:
    """The model with scale * B A added to its weights."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, a in adapter.tensors.items():
        _, layer, target, which = name.split(".")
        if which != "A":
            continue
        b = adapter.tensors[f"layers.{layer}.{target}.B"]
        block = model.model.layers[int(layer)]
        owner = block.mlp if hasattr(block.mlp, target) else block.self_attn
        getattr(owner, target).weight.data += adapter.config.scale * b.t() @ a
    with torch.no_grad():
        return model(IDS).logits


# ------------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize(
    ("target_modules", "found"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (list(LINEARS), LINEARS),
        ("all-linear", LINEARS),
        (r".*layers\.1\.(mlp\.down_proj|self_attn\.k_proj)", ("k_proj", "down_proj")),
    ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_writes_is_read(
    tmp_path: Path, tiny_llama: Path, base: LlamaForCausalLM, model_config: ModelConfig, target_modules: Any, found: Any, use_rslora: bool
) -> None:
    model = random_peft(base, target_modules=target_modules, use_rslora=use_rslora, lora_dropout=0.1).eval()
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    adapter.fitted(model_config)
    assert adapter.config == LoraConfig(r=4, lora_alpha=6, target_modules=found, use_rslora=use_rslora)
    assert adapter.base_model == str(tiny_llama)
    with torch.no_grad():
        torch.testing.assert_close(merged_logits(tiny_llama, adapter), model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "lora", [LoraConfig(r=3, lora_alpha=5), LoraConfig(r=8, lora_alpha=4.5, target_modules=("o_proj", "up_proj"), use_rslora=True)]
)
def test_what_is_written_here_peft_reads(
    tmp_path: Path, tiny_llama: Path, base: LlamaForCausalLM, model_config: ModelConfig, lora: LoraConfig
) -> None:
    adapter = random_adapter(model_config, lora)
    save_adapter(tmp_path / "adapter", adapter, model_config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")  # missing, or left over
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, merged_logits(tiny_llama, adapter), rtol=1e-4, atol=1e-4)
    again = load_adapter(tmp_path / "adapter")
    assert (again.config, again.base_model) == (adapter.config, "some/base")
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[k], adapter.tensors[k]) for k in adapter.tensors)


def test_names_and_settings_are_those_of_peft(tmp_path: Path, base: LlamaForCausalLM, model_config: ModelConfig) -> None:
    random_peft(base, target_modules=list(LINEARS)).save_pretrained(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "theirs"), model_config)
    theirs, ours = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    their_settings, our_settings = (json.loads((tmp_path / who / CONFIG_FILE).read_text()) for who in ("theirs", "ours"))
    their_settings["target_modules"].sort(key=LINEARS.index)
    assert {k: their_settings[k] for k in our_settings} == our_settings


# ----------------------------------------------------------------------------------------------------------------- refusals
@pytest.fixture
def folder(tmp_path: Path, model_config: ModelConfig) -> Path:
    save_adapter(tmp_path / "adapter", random_adapter(model_config, LoraConfig(r=4, target_modules=("q_proj", "down_proj"))), model_config)
    return tmp_path / "adapter"


def edit(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / WEIGHTS_FILE), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; supported are .*IA3, LORA"),
        ({"peft_type": "IA3"}, r"is no \(IA\)\^3 vector"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is not supported, got \['lm_head'\]"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 8}}, "the settings say rank 8"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"r": 0}, "r must be an integer between 1 and 512, got 0"),
        ({"r": "4"}, "r must be an integer"),
        ({"r": 5}, "the settings say rank 5"),
        ({"lora_alpha": -1}, "lora_alpha must be positive"),
        ({"lora_alpha": "big"}, "lora_alpha must be a number, got 'big'"),
    ],
)
def test_settings_that_are_not_supported(folder: Path, settings: dict[str, Any], reason: str) -> None:
    edit(folder, **settings)
    with pytest.raises(ValueError, match=reason):
        load_adapter(folder)


@pytest.mark.parametrize("settings", [{"rank_pattern": {}}, {"modules_to_save": None}, {"exclude_modules": ["x"]}, {"peft_version": "99"}])
def test_settings_that_change_nothing(folder: Path, settings: dict[str, Any]) -> None:
    edit(folder, **settings)
    load_adapter(folder)


def test_missing_and_damaged_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path / "none")
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_adapter(folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors; adapter_model\.bin \(a pickle\) is not read"):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "'base_model.model.lm_head.lora_A.weight' is no LoRA matrix"),
        ({"base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": torch.zeros(4, 32)}, "is no LoRA matrix"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": None}, r"layers\.0\.q_proj has lora_A only"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(3, 32)}, r"lora_A \[3, 32\]"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4)}, r"lora_A \[4\]"),
    ],
)
def test_tensors_that_do_not_belong(folder: Path, changes: dict[str, Tensor | None], reason: str) -> None:
    edit_tensors(folder, changes)
    with pytest.raises(ValueError, match=reason):
        load_adapter(folder)


def test_another_models_adapter_is_refused(model_config: ModelConfig) -> None:
    adapter = random_adapter(model_config, LoraConfig(r=4, target_modules=("q_proj",)))
    adapter.fitted(model_config)
    with pytest.raises(ValueError, match=r"layer 7, but the model has 2 layers"):
        AdapterFile(adapter.config, "", {"layers.7.q_proj.A": adapter.tensors["layers.0.q_proj.A"]}).fitted(model_config)
    narrow = adapter.tensors["layers.1.q_proj.A"][:, 1:]
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj\.A is \[4, 31\], but the model's takes \[4, 32\]"):
        AdapterFile(adapter.config, "", {"layers.1.q_proj.A": narrow}).fitted(model_config)


# --------------------------------------------------------------------------------------------------------------- writing
def test_saving_replaces_whole_folders_and_a_full_disk_leaves_the_old_one(folder: Path, model_config: ModelConfig) -> None:
    save_adapter(folder, random_adapter(model_config, LoraConfig(r=2, target_modules=("q_proj",))), model_config)
    assert load_adapter(folder).config.r == 2
    with file_size_limit(4096), pytest.raises(StorageError, match="cannot write"):
        save_adapter(folder, random_adapter(model_config, LoraConfig(r=64)), model_config)
    assert load_adapter(folder).config.r == 2
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
