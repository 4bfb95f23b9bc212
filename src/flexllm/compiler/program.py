"""The compiled functions of a model: one forward per mixture of sites and saves, one backward per job and kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from flexllm.compiler.autodiff import differentiate
from flexllm.compiler.emit import Emitted, emit_backward, emit_forward, reachable
from flexllm.compiler.prune import PrunedBackward, prune
from flexllm.compiler.remat import SavedTensor, choose_saved
from flexllm.compiler.trace import trace_layer
from flexllm.model.config import ModelConfig
from flexllm.ops.reference import ReferenceKernels
from flexllm.peft.base import PeftMethod
from flexllm.peft.lora import Lora


@dataclass(frozen=True)
class LayerBackward:
    """One layer's backward for one job. `saved`: what the forward must have stored for its rows."""

    saved: tuple[SavedTensor, ...]
    emitted: Emitted
    pruned: PrunedBackward
    recomputed: frozenset[Node]  # forward operators that the backward runs again

    @property
    def saved_names(self) -> frozenset[str]:
        return frozenset(t.name for t in self.saved)

    def bytes_per_token(self, itemsize: int) -> int:
        return sum(t.bytes_per_token(itemsize) for t in self.saved)


@dataclass(frozen=True)
class JobProgram:
    """`lowest` is the lowest adapted layer: no gradient leaves it downwards, so it needs less. Layers below it save nothing."""

    upper: LayerBackward
    lowest: LayerBackward
    lowest_layer: int
    num_layers: int

    def layer(self, index: int) -> LayerBackward:
        return self.lowest if index == self.lowest_layer else self.upper

    def saved_names(self, index: int) -> frozenset[str]:
        return self.layer(index).saved_names if index >= self.lowest_layer else frozenset()

    def bytes_per_token(self, itemsize: int) -> int:
        """Saved activations over all layers (K/V pages apart)."""
        return sum(self.layer(i).bytes_per_token(itemsize) for i in range(self.lowest_layer, self.num_layers))


def compile_layer_backward(
    config: ModelConfig, methods: Sequence[PeftMethod], level: str, kernels: ReferenceKernels, input_gradient: bool
) -> LayerBackward:
    """trace -> autodiff -> prune -> remat -> emit, for a layer some lower layer of which is adapted (`input_gradient`) or none."""
    pruned = prune(differentiate(trace_layer(config, methods)), input_gradient)
    saved = choose_saved(pruned, level)
    rebuilt = frozenset(n for n in reachable(pruned, set(saved)) if n in pruned.joint.forward_nodes and n.op == "call_function")
    return LayerBackward(tuple(saved.values()), emit_backward(pruned, saved, kernels), pruned, rebuilt)


def compile_job(
    config: ModelConfig, methods: Sequence[PeftMethod], level: str, kernels: ReferenceKernels, lowest_layer: int = 0
) -> JobProgram:
    upper, lowest = (compile_layer_backward(config, methods, level, kernels, input_gradient=g) for g in (True, False))
    return JobProgram(upper, lowest, lowest_layer, config.num_layers)


@dataclass
class ForwardPrograms:
    """Forward functions by (adapted sites, saved values), compiled when first met."""

    config: ModelConfig
    kernels: ReferenceKernels
    _cache: dict[tuple[frozenset[str], frozenset[str]], Emitted] = field(default_factory=dict)

    def get(self, sites: frozenset[str], saves: frozenset[str]) -> Callable[..., Any]:
        key = (sites, saves)
        if key not in self._cache:
            # The rank of the pooled LoRA parameters is the batch's business; the graph does not depend on it.
            methods: list[PeftMethod] = [Lora(tuple(sorted(sites)), rank=1)] if sites else []
            self._cache[key] = emit_forward(trace_layer(self.config, methods), self.kernels, sorted(saves))
        return self._cache[key].function
