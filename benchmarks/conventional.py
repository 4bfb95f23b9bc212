"""What ordinary autograd keeps between forward and backward when Hugging Face + PEFT finetune a model of the Llama kind.

Counted with saved-tensor hooks on the meta device: the real modules run, but no number is computed and no weight exists, so
any size takes a fraction of a second. Batch 1, a bf16 model, flash attention (q, k, v, o and lse are kept), Hugging Face's loss.
Every storage that the graph still holds after the forward counts once, parameters and buffers left out.
"""

from __future__ import annotations

import argparse
import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOTTLENECK = 64
_DEVICE = "meta"
_ATTENTION = "keeps_like_fa"  # a name with "flash" in it would make transformers look for the package
_FEW = 2  # layers to extrapolate from: below the first adapter autograd keeps less, so the first layer is not like the others


def _shape(hidden: int, inter: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **rest,
    }


def _llama(*sizes: int, **rest: Any) -> dict[str, Any]:
    return _shape(*sizes, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False, **rest)


def _llama31(*sizes: int) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return _llama(*sizes, 131072, bos_token_id=128000, eos_token_id=128001, rope_theta=500000.0, rope_scaling=scaling)


def _qwen25(*sizes: int) -> dict[str, Any]:  # q, k and v have biases, as always in this family
    rest = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645}
    return _shape(*sizes, 32768, architectures=["Qwen2ForCausalLM"], model_type="qwen2", **rest)


# What a config.json of these models says.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, 152064),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2),
}


@dataclass(frozen=True)
class SavedBytes:
    """Bytes kept for the backward of one sequence."""

    layers: int  # all layers
    head: int  # final norm, logits and loss
    per_token_layer: float  # what one more token adds to one layer

    @property
    def total(self) -> int:
        return self.layers + self.head


def conventional_bytes(
    config: PretrainedConfig | Mapping[str, Any], method: str, tokens: int, checkpointing: bool = False, fp32_adapters: bool = False
) -> SavedBytes:
    """What is kept for a sequence of `tokens`, with one of METHODS.

    With `checkpointing` (per layer) `layers` is the input of every layer, and all that one layer keeps while it is recomputed.
    `fp32_adapters` is PEFT's default; without, adapters are bf16 like the model.
    """
    fewer, more = (_build(config, method, layers, fp32_adapters) for layers in (_FEW, _FEW + 1))
    few, many = _count(fewer, tokens), _count(more, tokens)
    layer = many.body - few.body
    slope = (_count(more, 2 * tokens).body - _count(fewer, 2 * tokens).body - layer) / tokens
    count = _hf_config(config).num_hidden_layers
    layers = count * few.layer_input + layer if checkpointing else few.body + (count - _FEW) * layer
    return SavedBytes(layers, few.head, slope)


# ---------------------------------------------------------------------------------------------------------- the methods
class Bottleneck(nn.Sequential):
    """The branch of an adapter: up(relu(down(x)))."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__(nn.Linear(width, BOTTLENECK, dtype=dtype), nn.ReLU(), nn.Linear(BOTTLENECK, width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[0].weight.dtype)).to(x.dtype)


def _serial(_norm: nn.Module, last: nn.Module, branch: Bottleneck) -> None:
    """z -> z + branch(z), for what leaves the last linear of a sublayer."""
    last.branch = branch
    last.register_forward_hook(lambda _, __, z: z + branch(z))


def _parallel(norm: nn.Module, last: nn.Module, branch: Bottleneck) -> None:
    """z -> z + branch(x), where x is what enters the norm of the sublayer."""
    norm.branch = branch
    added: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _, args, __: added.append(branch(*args)))
    last.register_forward_hook(lambda _, __, z: z + added.pop())


def _bottlenecks(insert: Callable[[nn.Module, nn.Module, Bottleneck], None]) -> Callable[[nn.Module, bool], nn.Module]:
    """PEFT has no bottleneck adapters: here is one for attention and one for the MLP of every layer."""

    def adapt(model: nn.Module, fp32: bool) -> nn.Module:
        model.requires_grad_(False)
        for layer in model.model.layers:
            for norm, last in (
                (layer.input_layernorm, layer.self_attn.o_proj),
                (layer.post_attention_layernorm, layer.mlp.down_proj),
            ):
                insert(norm, last, Bottleneck(model.config.hidden_size, torch.float32 if fp32 else torch.bfloat16))
        return model

    return adapt


def _with_peft(config: type[peft.PeftConfig], **fields: Any) -> Callable[[nn.Module, bool], nn.Module]:
    def adapt(model: nn.Module, fp32: bool) -> nn.Module:
        adapted = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **fields))
        return adapted if fp32 else adapted.to(torch.bfloat16)  # on the meta device PEFT makes fp32 adapters whatever it is told

    return adapt


METHODS: dict[str, Callable[[nn.Module, bool], nn.Module]] = {
    "lora": _with_peft(peft.LoraConfig, r=16, target_modules=LINEARS),
    "lora-down": _with_peft(peft.LoraConfig, r=16, target_modules=["down_proj"]),
    "dora": _with_peft(peft.LoraConfig, r=16, target_modules=LINEARS, use_dora=True),
    "ia3": _with_peft(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": _with_peft(peft.PrefixTuningConfig, num_virtual_tokens=32),
    "prompt": _with_peft(peft.PromptTuningConfig, num_virtual_tokens=32),
    "vera": _with_peft(peft.VeraConfig, r=256, target_modules=LINEARS),
    "adapter": _bottlenecks(_serial),
    "adapter-parallel": _bottlenecks(_parallel),
}


# --------------------------------------------------------------------------------------------------------- the counting
class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps. There is no backward: nothing here ever goes backward."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


AttentionInterface.register(_ATTENTION, lambda _module, q, k, v, *_mask, **_: (_FlashAttention.apply(q, k, v), None))


class _Kept:
    """What autograd keeps in place of a tensor: as long as the graph lives, and no longer."""

    def __init__(self, tensor: torch.Tensor, in_head: bool) -> None:
        self.storage = tensor.untyped_storage()
        self.in_head = in_head

    def unpack(self) -> torch.Tensor:
        raise NotImplementedError("only the forward is run")


@dataclass(frozen=True)
class _Counted:
    body: int  # bytes kept before the final norm
    head: int  # and from there on
    layer_input: int  # bytes of what enters a layer


def _hf_config(config: PretrainedConfig | Mapping[str, Any], **changes: Any) -> PretrainedConfig:
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return AutoConfig.for_model(**{"model_type": "llama", **copy.deepcopy(dict(fields)), **changes})  # it writes into nested dicts


def _build(config: PretrainedConfig | Mapping[str, Any], method: str, layers: int, fp32_adapters: bool) -> nn.Module:
    changes = {"num_hidden_layers": layers, "layer_types": None, "use_cache": False}
    with torch.device(_DEVICE):
        model = AutoModelForCausalLM.from_config(_hf_config(config, **changes), dtype=torch.bfloat16, attn_implementation=_ATTENTION)
        return METHODS[method](model, fp32_adapters).train()


def _count(model: nn.Module, tokens: int) -> _Counted:
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
    entered: list[torch.Tensor] = []  # what enters the final norm, once it has been reached

    def pack(tensor: torch.Tensor) -> _Kept:
        kept.add(saved := _Kept(tensor, bool(entered)))
        return saved

    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    hook = base.model.norm.register_forward_pre_hook(lambda _, args: entered.extend(args))
    ids = torch.zeros(1, tokens, dtype=torch.long, device=_DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, _Kept.unpack):
        loss = model(input_ids=ids, labels=ids).loss
    hook.remove()

    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages = {saved.storage._cdata: saved for saved in sorted(kept, key=lambda saved: saved.in_head, reverse=True)}  # body over head
    sizes = [0, 0]
    for key, saved in storages.items():
        sizes[saved.in_head] += saved.storage.nbytes() if key not in own else 0
    del loss  # it held the graph until here
    return _Counted(*sizes, entered[0].nbytes)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    options.add_argument("--tokens", type=int, default=8192)
    args = options.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    config = SHAPES[args.shape]
    print(f"{args.shape}, one sequence of {args.tokens} tokens; GB but for the first column")
    print(f"{'':18}{'B/token/layer':>14}{'layers':>9}{'head':>9}{'total':>9}{'checkpointing':>15}{'fp32 adapters':>15}")
    for method in METHODS:
        saved = conventional_bytes(config, method, args.tokens)
        others = (conventional_bytes(config, method, args.tokens, **{flag: True}) for flag in ("checkpointing", "fp32_adapters"))
        checkpointing, fp32 = (other.total / 1e9 for other in others)
        sizes = f"{saved.layers / 1e9:9.2f}{saved.head / 1e9:9.2f}{saved.total / 1e9:9.2f}{checkpointing:15.2f}{fp32:15.2f}"
        print(f"{method:18}{saved.per_token_layer:14,.0f}{sizes}")

    print("\nGB in total, by shape")
    print(" " * 18 + "".join(f"{shape:>15}" for shape in SHAPES))
    for method in METHODS:
        totals = (conventional_bytes(config, method, args.tokens).total for config in SHAPES.values())
        print(f"{method:18}" + "".join(f"{total / 1e9:15.2f}" for total in totals))


if __name__ == "__main__":
    main()
