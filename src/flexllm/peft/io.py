"""LoRA adapters as PEFT has them on disk: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexllm.config import LORA_TARGETS, LoraConfig
from flexllm.files import atomic_folder
from flexllm.model.config import ModelConfig
from flexllm.model.layer import site_shapes

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_BLOCK = {t: "mlp" if t in ("gate_proj", "up_proj", "down_proj") else "self_attn" for t in LORA_TARGETS}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
# Settings that change what an adapter computes, and that are not implemented: each must be absent, null, false or empty.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
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


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A LoRA adapter. Pairs that are absent are zero: the adapter leaves that linear alone."""

    config: LoraConfig
    base_model: str
    tensors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, target) -> (A [r, in], B [out, r])

    def check_against(self, model: ModelConfig) -> None:
        """ValueError unless every pair fits a linear of the model; names the first that does not."""
        shapes = site_shapes(model)
        for (layer, target), (a, b) in sorted(self.tensors.items()):
            if layer >= model.num_layers:
                raise ValueError(f"the adapter has a layer {layer}, but the model has {model.num_layers} layers; another base model's?")
            found, want = (b.shape[0], a.shape[1]), shapes[target]
            if found != want:
                raise ValueError(
                    f"the adapter's layers.{layer}.{target} is for a linear [out, in] of {list(found)}, but the model's is {list(want)}; "
                    "another base model's?"
                )


def load_adapter(folder: str | Path) -> AdapterFile:
    """Read a LoRA adapter; tensors keep the type they are stored in. The config's targets are those the file has tensors for.

    ValueError that says what is missing, damaged or not supported. Dropout is a matter of training and is not kept.
    """
    folder = Path(folder)
    settings = _read_settings(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    targets = {target for _, target in tensors}
    try:
        config = LoraConfig(
            r=settings.get("r", 8),
            lora_alpha=settings.get("lora_alpha", 8),
            target_modules=tuple(t for t in LORA_TARGETS if t in targets),
            use_rslora=bool(settings.get("use_rslora", False)),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    for (layer, target), (a, b) in tensors.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config.r or b.shape[1] != config.r:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: layers.{layer}.{target} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"but {CONFIG_FILE} says rank {config.r}"
            )
        if not (a.isfinite().all() and b.isfinite().all()):  # a rank mask of zeros does not keep NaN from the rows of others
            raise ValueError(f"{folder / WEIGHTS_FILE}: layers.{layer}.{target} has values that are not finite")
    return AdapterFile(config, settings.get("base_model_name_or_path") or "", tensors)


def save_adapter(folder: str | Path, adapter: AdapterFile) -> None:
    """Write the folder, whole or not at all, in the place of what is there. StorageError when the disk refuses."""
    with atomic_folder(Path(folder)) as part:
        settings = json.dumps(_settings_of(adapter), indent=2) + "\n"
        (part / CONFIG_FILE).write_text(settings, encoding="utf-8")
        named = {}
        for (layer, target), (a, b) in adapter.tensors.items():
            prefix = f"base_model.model.model.layers.{layer}.{_BLOCK[target]}.{target}"
            named[f"{prefix}.lora_A.weight"] = a.detach().cpu().contiguous()
            named[f"{prefix}.lora_B.weight"] = b.detach().cpu().contiguous()
        save_file(named, part / WEIGHTS_FILE, metadata={"format": "pt"})


def _settings_of(adapter: AdapterFile) -> dict[str, Any]:
    config, alpha = adapter.config, adapter.config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": config.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no {CONFIG_FILE}; not a PEFT adapter folder") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; only 'LORA' adapters are supported")
    for key in _UNSUPPORTED:
        if settings.get(key):
            raise ValueError(f"{path}: {key} is not supported in this version, got {settings[key]!r}")
    if settings.get("layers_to_transform") is not None:
        raise ValueError(f"{path}: layers_to_transform is not supported in this version, got {settings['layers_to_transform']!r}")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {settings['bias']!r}")
    if settings.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"{path}: init_lora_weights {settings['init_lora_weights']!r} changes the base weights; convert the adapter to plain LoRA"
        )
    return settings


def _read_tensors(path: Path) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                match = _NAME.fullmatch(name)
                if match is None or _BLOCK.get(match[3]) != match[2]:
                    raise ValueError(f"{path}: {name!r} is no LoRA matrix of a supported target ({', '.join(LORA_TARGETS)})")
                halves.setdefault((int(match[1]), match[3]), {})[match[4]] = file.get_tensor(name)
    except FileNotFoundError:
        pickled = "; adapter_model.bin (a pickle) is not read" if path.with_suffix(".bin").exists() else ""
        raise ValueError(f"{path.parent}: no {WEIGHTS_FILE}{pickled}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors; truncated or corrupt? ({error})") from error
    if not halves:
        raise ValueError(f"{path}: has no tensors")
    for (layer, target), pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{path}: layers.{layer}.{target} has lora_{'A' if 'A' in pair else 'B'} only")
    return {key: (pair["A"], pair["B"]) for key, pair in sorted(halves.items())}
