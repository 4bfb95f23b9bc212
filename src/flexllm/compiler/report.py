"""What the compiler decided, tensor by tensor: kept, recomputed or pruned, with bytes and FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from flexllm.compiler.program import LayerBackward, compile_layer_backward
from flexllm.compiler.remat import rebuilt_from
from flexllm.model.config import ModelConfig
from flexllm.ops.operators import Operator
from flexllm.ops.reference import ReferenceKernels
from flexllm.peft.base import PeftMethod
from flexllm.peft.config import LoraConfig
from flexllm.peft.lora import Lora

ITEMSIZE = 2  # bf16
IN_PAGES = {"k": "K stays in the sequence's K/V pages", "v_proj": "V stays in the sequence's K/V pages"}


@dataclass(frozen=True)
class TensorRow:
    tensor: str
    bytes_per_token: int  # in one layer, bf16
    decision: str  # kept | recomputed | pruned | paged
    reason: str
    extra_flops: float = 0.0  # per token, to build it again


@dataclass(frozen=True)
class CompileReport:
    """Of one layer that has adapted layers below it; totals over all layers (the lowest one keeps a little less)."""

    title: str
    rows: tuple[TensorRow, ...]
    dropped_gradients: tuple[str, ...]
    layer_bytes_per_token: int
    bytes_per_token: int  # all layers, saved activations
    kv_bytes_per_token: int  # all layers, in pages anyway
    seq_length: int
    total_bytes: int  # activations of one sequence of seq_length
    extra_flops_per_token: float  # recomputation, all layers
    backward_flops_per_token: float  # all layers, recomputation included, attention's own apart
    backward_source: str  # the emitted function


def compile_report(config: ModelConfig, peft: LoraConfig, save_level: str, seq_length: int) -> CompileReport:
    """Needs no weights. ValueError for an unknown level."""
    methods: list[PeftMethod] = [Lora(peft.target_modules, peft.r)]
    kernels = ReferenceKernels()
    upper, lowest = (compile_layer_backward(config, methods, save_level, kernels, g) for g in (True, False))
    above = config.num_layers - 1
    per_token = above * upper.bytes_per_token(ITEMSIZE) + lowest.bytes_per_token(ITEMSIZE)
    dropped = [f"d {_name(node)}: {why}" for node, why in upper.pruned.dropped]
    return CompileReport(
        title=f"{config.model_type}, {config.num_layers} layers, LoRA r={peft.r} on {', '.join(peft.target_modules)}, level {save_level}",
        rows=tuple(_rows(upper)),
        dropped_gradients=tuple(dropped),
        layer_bytes_per_token=upper.bytes_per_token(ITEMSIZE),
        bytes_per_token=per_token,
        kv_bytes_per_token=config.num_layers * 2 * config.num_kv_heads * config.head_dim * ITEMSIZE,
        seq_length=seq_length,
        total_bytes=per_token * seq_length,
        extra_flops_per_token=above * _flops(upper.recomputed) + _flops(lowest.recomputed),
        backward_flops_per_token=sum(
            n * (_flops(b.pruned.live) + _flops(b.recomputed)) for n, b in ((above, upper), (1, lowest))
        ),
        backward_source=upper.emitted.source,
    )  # fmt: skip


def _rows(backward: LayerBackward) -> list[TensorRow]:
    rows = []
    kept, needed = backward.saved_names, set(backward.pruned.needed)
    for name, node in backward.pruned.joint.layer.named.items():
        size = node.meta["columns"] * (4 if node.meta.get("fp32") else ITEMSIZE)
        if name in kept:
            readers = [u.target.name for u in node.users if u in backward.pruned.live and isinstance(u.target, Operator)]
            reader = readers[0] if node in needed else "a recomputation"
            row = TensorRow(name, size, "kept", f"read by {reader}")
        elif node in backward.recomputed:
            sources = ", ".join(_name(n) for n in rebuilt_from(node) or ())
            row = TensorRow(name, size, "recomputed", f"from {sources}", node.meta.get("flops", 0.0))
        elif name in IN_PAGES:
            row = TensorRow(name, size, "paged", IN_PAGES[name])
        else:
            row = TensorRow(name, size, "pruned", "no gradient on the way to a trainable parameter reads it")
        rows.append(row)
    return rows


def _name(node: Node) -> str:
    if "names" in node.meta:
        return node.meta["names"][0]
    return node.meta.get("source", node.name)


def _flops(nodes: frozenset[Node]) -> float:
    return sum(n.meta.get("flops", 0.0) for n in nodes)
