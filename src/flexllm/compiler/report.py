"""What the compiler decided, tensor by tensor and level by level, with bytes and FLOPs. Needs no weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from flexllm.compiler.levels import JobCompiler, LevelPlan
from flexllm.compiler.program import LayerCompiler
from flexllm.compiler.remat import ITEMSIZE, Choice, DeviceCosts, producer, rebuilt_from, saved_tensor
from flexllm.model.config import ModelConfig
from flexllm.ops.operators import Operator, is_operator
from flexllm.ops.reference import ReferenceKernels
from flexllm.peft import methods as methods  # makes them known
from flexllm.peft.base import Binding, method_of
from flexllm.peft.config import PeftConfig


@dataclass(frozen=True)
class TensorRow:
    tensor: str
    bytes_per_token: int  # in one layer, bf16
    decision: str  # kept | compressed | recomputed | paged | pruned
    reason: str
    extra_flops: float = 0.0  # per token, to build it again


@dataclass(frozen=True)
class LevelRow:
    """All layers, per token, bf16."""

    level: str
    saved_bytes: int  # activations between forward and backward, K/V pages apart
    gradient_bytes: int  # the gradient on its way down, and dK/dV accumulators of the layers under way
    total_bytes: int  # both, of the whole batch
    extra_flops: float  # recomputation
    extra_flops_share: float  # of forward and backward, head included
    relative_time: float  # of the backward, by the device's costs; 1.0 recomputes nothing


@dataclass(frozen=True)
class CompileReport:
    """`rows` and `source` are of the most common kind of layer; the lowest adapted one keeps less."""

    title: str
    level: str
    seq_length: int
    batch: int
    rows: tuple[TensorRow, ...]
    dropped_gradients: tuple[str, ...]
    levels: tuple[LevelRow, ...]  # the one asked for, or all
    kv_bytes_per_token: int  # all layers, in pages anyway
    flops_per_token: float  # forward and backward, all layers and the head, nothing recomputed
    source: str  # the emitted backward


def report_compiler(config: ModelConfig, peft: PeftConfig, seq_length: int, costs: DeviceCosts | None = None) -> JobCompiler:
    """The compiler of a job of this shape; without weights it can do everything but run."""
    method = method_of(peft)
    binding = Binding(method.kind(peft), method, method.features(peft), method.rank(peft))
    context = (seq_length + peft.num_virtual_tokens) // 2
    return JobCompiler(config, binding, peft.layers(config.num_layers), ReferenceKernels(), costs or DeviceCosts(), context, ITEMSIZE)


def compile_report(config: ModelConfig, peft: PeftConfig, save_level: str, seq_length: int, batch: int = 1) -> CompileReport:
    """`save_level` "auto" shows the fastest level's tensors and lists all. ValueError for an unknown level."""
    job = report_compiler(config, peft, seq_length)
    plans = job.levels(save_level)
    if save_level == "auto":
        plans = (*job.levels("keep"), *plans)
    shown = job.levels("recompute" if save_level == "auto" else save_level)[0]
    main = max(job.compilers, key=job.kinds.count)
    compiler, choice = job.compilers[main], shown.choices[job.kinds.index(main)]
    flops = job_flops(job)
    return CompileReport(
        title=f"{config.model_type}, {config.num_layers} layers, {peft.type} on {', '.join(peft.target_modules)}",
        level=shown.level.name,
        seq_length=seq_length,
        batch=batch,
        rows=tuple(tensor_rows(compiler, choice)),
        dropped_gradients=tuple(f"d {_name(node)}: {why}" for node, why in compiler.pruned.dropped),
        levels=tuple(_level_row(p, flops, seq_length * batch) for p in plans),
        kv_bytes_per_token=config.num_layers * 2 * config.num_kv_heads * config.head_dim * ITEMSIZE,
        flops_per_token=flops,
        source=compiler.compile(choice).emitted.source,
    )


def job_flops(job: JobCompiler) -> float:
    """Forward and backward of one token: all layers (the frozen ones below the lowest adapted forward only) and the head, twice."""
    layers = [job.compilers[kind] for kind in job.kinds]
    head = 4.0 * job.config.hidden_size * job.config.vocab_size
    return head + sum(c.forward_flops + c.backward_flops for c in layers) + job.lowest_layer * layers[-1].forward_flops


def tensor_rows(compiler: LayerCompiler, choice: Choice) -> list[TensorRow]:
    """Every value of the layer that has a name, and what becomes of it."""
    pruned, remat = compiler.pruned, compiler.remat
    kept, needed, again = set(choice.saved), set(pruned.needed), remat.recomputed(choice.saved)
    rows = []
    named = sorted((n for n in pruned.forward if "names" in n.meta), key=list(pruned.joint.layer.graph.nodes).index)
    for node in named:
        size = saved_tensor(node).bytes_per_token(ITEMSIZE)
        if node in kept:
            reader = ", ".join(_readers(node, pruned.live)) if node in needed else "a recomputation"
            row = TensorRow(_name(node), size, "compressed" if "bits" in node.meta else "kept", f"read by {reader}")
        elif producer(node) in again and (node in needed or _is_read(node, again)):
            sources = ", ".join(_name(n) for n in rebuilt_from(node) or ()) or "pages"
            row = TensorRow(_name(node), size, "recomputed", f"from {sources}", remat.flops([producer(node)]))
        elif node.meta.get("paged"):
            row = TensorRow(_name(node), size, "paged", "stays in the sequence's K/V pages")
        else:
            row = TensorRow(_name(node), size, "pruned", "nothing on the way to a trainable parameter reads it")
        rows.append(row)
    return rows


def _level_row(plan: LevelPlan, flops: float, tokens: int) -> LevelRow:
    level = plan.level
    return LevelRow(
        level=level.name,
        saved_bytes=plan.saved_bytes,
        gradient_bytes=level.bytes_per_token - plan.saved_bytes,
        total_bytes=level.bytes_per_token * tokens,
        extra_flops=plan.recomputed_flops,
        extra_flops_share=plan.recomputed_flops / flops,
        relative_time=level.cost,
    )


def _readers(node: Node, live: frozenset[Node]) -> list[str]:
    return list(dict.fromkeys(u.target.name for u in node.users if u in live and isinstance(u.target, Operator)))


def _is_read(node: Node, again: frozenset[Node]) -> bool:
    return any((u in again and is_operator(u)) or u.target is operator.getitem for u in node.users)


def _name(node: Node) -> str:
    return node.meta["names"][0] if "names" in node.meta else node.meta.get("source", node.name)
