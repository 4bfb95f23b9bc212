"""The compiled functions of a model: one forward per mixture of adapters and saves, one backward per kind of layer and saved set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from flexllm.compiler.autodiff import differentiate
from flexllm.compiler.emit import Emitted, emit_backward, emit_forward
from flexllm.compiler.prune import PrunedBackward, prune
from flexllm.compiler.remat import Choice, DeviceCosts, Rematerialization, SavedTensor, saved_tensor
from flexllm.compiler.trace import trace_layer
from flexllm.model.config import ModelConfig
from flexllm.ops.operators import is_operator
from flexllm.ops.reference import ReferenceKernels
from flexllm.peft.base import Binding


@dataclass(frozen=True)
class LayerKind:
    """What a job's layers differ in. `adapted`: the adapter has parameters there; `first`: the model's first layer;
    `input_gradient`: a lower layer is adapted."""

    adapted: bool
    first: bool
    input_gradient: bool


@dataclass(frozen=True, eq=False)
class LayerBackward:
    """One layer's backward for one job. `saved`: what the forward must have stored for its rows."""

    saved: tuple[SavedTensor, ...]
    emitted: Emitted

    @property
    def saved_names(self) -> frozenset[str]:
        return frozenset(t.name for t in self.saved)

    def bytes_per_token(self, itemsize: int) -> int:
        return sum(t.bytes_per_token(itemsize) for t in self.saved)


class LayerCompiler:
    """trace -> autodiff -> prune, once for a kind of layer; then remat -> emit for each saved set that is asked for."""

    def __init__(
        self,
        config: ModelConfig,
        binding: Binding,
        kind: LayerKind,
        kernels: ReferenceKernels,
        costs: DeviceCosts,
        context: int,
    ) -> None:
        self.kernels = kernels
        graph = trace_layer(config, [binding] if kind.adapted else [], kind.first)
        self.pruned: PrunedBackward = prune(differentiate(graph), kind.input_gradient)
        self.remat = Rematerialization(self.pruned, costs, context)
        forward = [n for n in self.pruned.joint.forward_nodes if is_operator(n)]
        self.forward_flops = self.remat.flops(forward)  # of a row
        self.forward_seconds = sum(self.remat.op_seconds(op) for op in forward)
        self.backward_flops = self.remat.flops(self.pruned.live)
        self.backward_seconds = sum(self.remat.op_seconds(op) for op in self.pruned.live if is_operator(op))
        self._compiled: dict[tuple[Node, ...], LayerBackward] = {}

    def compile(self, choice: Choice) -> LayerBackward:
        if choice.saved not in self._compiled:
            saved = tuple(saved_tensor(n) for n in choice.saved)
            self._compiled[choice.saved] = LayerBackward(saved, emit_backward(self.pruned, choice.saved, self.kernels))
        return self._compiled[choice.saved]


@dataclass
class ForwardPrograms:
    """Forward functions by (bound adapters, first layer, saved values), compiled when first met."""

    config: ModelConfig
    kernels: ReferenceKernels
    _cache: dict[tuple[tuple[Binding, ...], bool, frozenset[str]], Emitted] = field(default_factory=dict)

    def get(self, bindings: tuple[Binding, ...], first: bool, saves: frozenset[str]) -> Callable[..., Any]:
        key = (bindings, first, saves)
        if key not in self._cache:
            pruned = prune(differentiate(trace_layer(self.config, bindings, first)), input_gradient=True)
            self._cache[key] = emit_forward(pruned, self.kernels, sorted(saves))
        return self._cache[key].function
