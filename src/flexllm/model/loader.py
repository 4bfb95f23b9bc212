"""Models into memory: a reference (folder, .gguf file, hub id, nothing) to a folder, a folder to merged weight tensors.

Shapes: V vocabulary, d hidden, q = heads * head_dim, kv = kv_heads * head_dim, hd head_dim, f intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexllm.model import hub
from flexllm.model.config import ModelConfig
from flexllm.ops.quantized import QuantizedWeight

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_INIT_STD = 0.02

Projection = TypeVar("Projection", Tensor, QuantizedWeight)


@dataclass(eq=False, slots=True)
class LayerWeights(Generic[Projection]):
    """One decoder layer; projections that read the same input are merged along their rows. Projections are Tensors or, quantized,
    QuantizedWeights."""

    input_norm: Tensor  # [d]
    qkv: Projection  # [q + 2kv, d]: q, k, v
    qkv_bias: Tensor | None  # [q + 2kv]
    q_norm: Tensor | None  # [hd]
    k_norm: Tensor | None  # [hd]
    o: Projection  # [d, q]
    post_norm: Tensor  # [d]
    gate_up: Projection  # [2f, d]: gate, up
    down: Projection  # [d, f]

    def tensors(self) -> Iterator[Tensor]:
        for value in (getattr(self, f.name) for f in fields(self)):
            if isinstance(value, QuantizedWeight):
                yield from value.tensors()
            elif value is not None:
                yield value


@dataclass(eq=False, slots=True)
class ModelWeights:
    embed: Tensor  # [V, d]
    layers: list[LayerWeights]
    final_norm: Tensor  # [d]
    lm_head: Tensor  # [V, d]; the same object as `embed` when tied

    def tensors(self) -> Iterator[Tensor]:
        """Every distinct tensor once."""
        yield self.embed
        for layer in self.layers:
            yield from layer.tensors()
        yield self.final_norm
        if self.lm_head is not self.embed:
            yield self.lm_head

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())


def resolve_model(ref: str | None, weights: bool = True) -> Path:
    """The folder (config.json, safetensors, tokenizer) of a model folder, a .gguf file, a hub id, or the default model (None).

    Without `weights` a folder with a config.json will do. A .gguf file is converted once into the cache folder. Raises ValueError that
    says what is missing.
    """
    if ref is None:
        from flexllm.model import default_model  # here and below: only these two need the gguf package

        folder = default_model.folder()
    elif (path := Path(ref).expanduser()).is_dir():
        folder = path
    elif path.suffix == ".gguf":
        from flexllm.model import gguf_import

        folder = gguf_import.converted(path)
    elif _HUB_ID.fullmatch(ref):
        folder = hub.snapshot(ref)
    else:
        raise ValueError(f"model {ref!r}: no such folder, and not a Hugging Face hub id (organization/name)")
    if weights:
        hub.check_folder(folder)
    return folder


def default_dtype(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """What `dtype="auto"` means: float32 where the model is stored so or the device lacks bf16 arithmetic, else bfloat16.

    A CPU has it with AVX512-BF16 or AMX; elsewhere it is emulated, slower than float32.
    """
    if torch.device(device).type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 and config.torch_dtype != "float32" else torch.float32


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, quantization: str | None = None
) -> ModelWeights:
    """Read a Hugging Face folder tensor by tensor; at most one tensor is held besides the result, or one layer if it is quantized.

    `quantization` (q8_0, q4_0, q4_1) is of the projections. Raises ValueError that names file and tensor for what is missing,
    truncated, of another shape, or cannot be quantized.
    """
    weights = _empty(config, dtype, device, num_layers=0)
    with _Checkpoint(folder) as checkpoint:
        checkpoint.read("model.embed_tokens.weight", weights.embed)
        checkpoint.read("model.norm.weight", weights.final_norm)
        if not config.tie_embeddings:
            checkpoint.read("lm_head.weight", weights.lm_head)
        for i in range(config.num_layers):
            layer = _empty_layer(config, dtype, device)
            for name, out in _hf_parts(layer, config):
                checkpoint.read(f"model.layers.{i}.{name}", out)
            if quantization is not None:
                _quantize_(layer, quantization, f"model.layers.{i}")
            weights.layers.append(layer)
    return weights


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, quantization: str | None = None, seed: int = 0
) -> ModelWeights:
    """A model of the right shapes that knows nothing: N(0, 0.02) matrices and biases, unit norms. For benchmarks and tests."""
    weights = _empty(config, dtype, device, config.num_layers)
    generator = torch.Generator(device=device).manual_seed(seed)
    norms = [weights.final_norm]
    norms += [t for layer in weights.layers for t in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm) if t is not None]
    for tensor in weights.tensors():
        tensor.normal_(std=_INIT_STD, generator=generator)
    for norm in norms:
        norm.fill_(1.0)
    if quantization is not None:
        for i, layer in enumerate(weights.layers):
            _quantize_(layer, quantization, f"model.layers.{i}")
    return weights


def _empty(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, num_layers: int) -> ModelWeights:
    embed = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    layers = [_empty_layer(config, dtype, device) for _ in range(num_layers)]
    lm_head = embed if config.tie_embeddings else torch.empty_like(embed)
    return ModelWeights(embed, layers, embed.new_empty(config.hidden_size), lm_head)


def _empty_layer(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> LayerWeights[Tensor]:
    d, f, q, kv, hd = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size, config.head_dim

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return LayerWeights(
        input_norm=new(d),
        qkv=new(q + 2 * kv, d),
        qkv_bias=new(q + 2 * kv) if config.qkv_bias else None,
        q_norm=new(hd) if config.qk_norm else None,
        k_norm=new(hd) if config.qk_norm else None,
        o=new(d, q),
        post_norm=new(d),
        gate_up=new(2 * f, d),
        down=new(d, f),
    )


def _quantize_(layer: LayerWeights, format: str, name: str) -> None:
    """Put the projections into blocks, one after the other. A row's blocks are its own: merged ones need no parting."""
    for part in ("qkv", "o", "gate_up", "down"):
        weight = getattr(layer, part)
        try:
            setattr(layer, part, QuantizedWeight.quantize(weight, format))
        except ValueError as error:
            raise ValueError(f"{name}.{part} {list(weight.shape)} cannot be quantized: {error}") from error


def _hf_parts(layer: LayerWeights[Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, view of the tensor it fills) for every tensor of a layer."""
    qkv_rows = [config.q_size, config.kv_size, config.kv_size]
    projections = [f"self_attn.{p}_proj" for p in "qkv"]
    yield "input_layernorm.weight", layer.input_norm
    yield from zip((f"{p}.weight" for p in projections), layer.qkv.split(qkv_rows), strict=True)
    if layer.qkv_bias is not None:
        yield from zip((f"{p}.bias" for p in projections), layer.qkv_bias.split(qkv_rows), strict=True)
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    yield "self_attn.o_proj.weight", layer.o
    yield "post_attention_layernorm.weight", layer.post_norm
    yield from zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), layer.gate_up.chunk(2), strict=True)
    yield "mlp.down_proj.weight", layer.down


class _Checkpoint:
    """The tensors of a model folder by name, in whichever safetensors file they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Path, Any]] = {}  # tensor name -> its file, open
        self._stack = ExitStack()

    def __enter__(self) -> _Checkpoint:
        with ExitStack() as stack:
            for path in hub.weight_files(self._folder):
                try:
                    file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{path}: cannot be read as safetensors; truncated or corrupt? ({error})") from error
                self._files |= dict.fromkeys(file.keys(), (path, file))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out`, converting dtype and device."""
        if name not in self._files:
            raise ValueError(f"{self._folder}: tensor {name} is missing from the weights")
        path, file = self._files[name]
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(out.shape):
            raise ValueError(f"{path}: tensor {name} has shape {list(shape)}, expected {list(out.shape)} by config.json")
        tensor = file.get_tensor(name)
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"{path}: tensor {name} is stored as {tensor.dtype}; supported: bf16, fp16, fp32, fp64")
        out.copy_(tensor)
