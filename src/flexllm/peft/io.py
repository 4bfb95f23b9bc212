"""Adapters on disk as PEFT has them: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexllm.files import atomic_folder, write_safetensors
from flexllm.model.config import ModelConfig
from flexllm.model.layer import site_shapes
from flexllm.peft import methods as methods  # makes them known
from flexllm.peft.base import Parameter, PeftMethod, method_of, peft_methods, refuse
from flexllm.peft.config import PeftConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter: its settings, and its parameters by "layers.<n>.<site>.<parameter>" as the pool has them. Those that are absent
    are neutral: the adapter leaves that place alone."""

    config: PeftConfig
    base_model: str
    tensors: Mapping[str, Tensor]

    def fitted(self, model: ModelConfig) -> AdapterFile:
        """The same, cut to the model. ValueError unless every tensor fits a site of it; names the first that does not."""
        fitting = {}
        for name, tensor in self.tensors.items():
            layer, site, parameter = name.split(".")[1:]
            if int(layer) >= model.num_layers:
                raise ValueError(f"the adapter has a layer {layer}, but the model has {model.num_layers} layers; another base model's?")
            want = adapter_parameters(self.config, model, site).get(parameter)
            if want is None:
                raise ValueError(f"the adapter's {name} has no place in the model")
            if want.shared:
                tensor = tensor[:, : want.width]
            if tuple(tensor.shape) != (want.rows, want.width):
                found, expected = list(tensor.shape), [want.rows, want.width]
                raise ValueError(f"the adapter's {name} is {found}, but the model's takes {expected}; another base model's?")
            fitting[name] = tensor
        return AdapterFile(self.config, self.base_model, fitting)


def adapter_parameters(config: PeftConfig, model: ModelConfig, site: str) -> Mapping[str, Parameter]:
    """Of one adapter at a site of the model."""
    method = method_of(config)
    return method.parameters(site, *site_shapes(model)[site], method.rank(config), method.features(config))


def load_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter; tensors keep the type they are stored in.

    ValueError that says what is missing, damaged or not supported.
    """
    folder = Path(folder)
    settings = _read_settings(folder / CONFIG_FILE)
    method = _method(settings, folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    try:
        refuse(settings, ("modules_to_save",))
        config, found = method.read(settings, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    for name, tensor in found.items():
        if not tensor.isfinite().all():  # a rank mask of zeros does not keep NaN from the rows of others
            raise ValueError(f"{folder / WEIGHTS_FILE}: {name} has values that are not finite")
    return AdapterFile(config, settings.get("base_model_name_or_path") or "", found)


def save_adapter(folder: str | Path, adapter: AdapterFile, model: ModelConfig, beside: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the folder, whole or not at all, in the place of what is there, with the text files `beside` by name. StorageError when the
    disk refuses."""
    settings, tensors = method_of(adapter.config).write(adapter.config, adapter.tensors, model)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model, "inference_mode": True}
    with atomic_folder(Path(folder)) as part:
        (part / CONFIG_FILE).write_text(json.dumps(settings | common, indent=2) + "\n", encoding="utf-8")
        write_safetensors(part / WEIGHTS_FILE, tensors, {"format": "pt"})
        for name, text in beside.items():
            (part / name).write_text(text, encoding="utf-8")


def _method(settings: Mapping[str, Any], path: Path) -> PeftMethod:
    by_type = {m.file_type: m for m in peft_methods().values()}
    found = settings.get("peft_type")
    if found not in by_type:
        raise ValueError(f"{path}: peft_type is {found!r}; supported are {', '.join(sorted(by_type))}")
    return by_type[found]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no {CONFIG_FILE}; not a PEFT adapter folder") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        pickled = "; adapter_model.bin (a pickle) is not read" if path.with_suffix(".bin").exists() else ""
        raise ValueError(f"{path.parent}: no {WEIGHTS_FILE}{pickled}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors; truncated or corrupt? ({error})") from error
    if not tensors:
        raise ValueError(f"{path}: has no tensors")
    return tensors
