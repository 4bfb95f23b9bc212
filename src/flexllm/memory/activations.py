"""What one training sequence holds besides its pages: the saved set, and the gradients on their way down the layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexllm.compiler.levels import LevelProgram
from flexllm.compiler.remat import SavedTensor
from flexllm.core import Sequence
from flexllm.ops.reference import compute_dtype
from flexllm.peft.pool import AdapterSlot


class ActivationStore:
    """What the compiled forward keeps for the compiled backward.

    Per layer and name a tensor [length, columns], indexed by absolute position; allocated at the first write of a layer,
    freed when the layer's backward is done. `bytes` is what is held now.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self._layers: dict[int, dict[str, Tensor]] = {}
        self.bytes = 0

    def allocate(self, layer: int, saved: tuple[SavedTensor, ...]) -> None:
        """Make room for a layer's saved set, if it is not there yet."""
        if layer in self._layers or not saved:
            return
        self._layers[layer] = {t.name: torch.empty(self.length, t.stored_columns, dtype=self._dtype(t), device=self.device) for t in saved}
        self.bytes += sum(t.nbytes for t in self._layers[layer].values())

    def _dtype(self, tensor: SavedTensor) -> torch.dtype:
        if tensor.bits is not None:
            return torch.uint8
        return compute_dtype(self.dtype) if tensor.fp32 else self.dtype

    def write(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        self._layers[layer][name][start : start + rows.shape[0]] = rows

    def wants(self, layer: int, name: str) -> bool:
        return name in self._layers.get(layer, ())

    def read(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        return {name: t[start:end] for name, t in self._layers.get(layer, {}).items()}

    def free(self, layer: int) -> None:
        self.bytes -= sum(t.nbytes for t in self._layers.pop(layer, {}).values())

    def check_integrity(self) -> None:
        assert self.bytes == sum(t.nbytes for layer in self._layers.values() for t in layer.values())


@dataclass(eq=False)
class SequenceState:
    """The tensors of one sequence in flight.

    `grad` [T, d]: row t holds the gradient of the output of the lowest layer whose backward has passed over t (algorithms.md 2.2).
    `kv_grad`: of the layers under way, by number, [2, T, K, hd] in fp32: dK and dV.
    """

    sequence: Sequence
    ids: np.ndarray  # [T] int32
    labels: Tensor  # [T] int64; IGNORED where no label counts
    slot: AdapterSlot
    program: LevelProgram | None  # None: forward only (validation)
    store: ActivationStore
    dropout_seed: int | None = None  # None: nothing is dropped (validation)
    grad: Tensor | None = None
    under_way: Tensor | None = None  # [n, d]: the next rows, interrupted, as the layer that they reached will take them
    reached: int = 0  # that layer
    kv_grad: dict[int, Tensor] = field(default_factory=dict)

    def prepare(self, layer: int) -> frozenset[str]:
        """Make room for what `layer` saves; returns its names."""
        if self.program is None:
            return frozenset()
        saved = self.program.stored(layer)
        self.store.allocate(layer, saved)
        return frozenset(t.name for t in saved)

    @property
    def bytes(self) -> int:
        """Held now: the saved set, the gradients in flight and a window under way."""
        others = (*self.kv_grad.values(), self.grad, self.under_way)
        return self.store.bytes + sum(t.nbytes for t in others if t is not None)

    def suspend(self, layer: int, rows: Tensor) -> None:
        """Keep the rows of a window whose layers below `layer` are done: copied, as they are part of a batch that would be kept whole. If
        they are only the first of those under way, all of these stay where they were."""
        if self.under_way is None or len(self.under_way) == len(rows):
            self.reached, self.under_way = layer, rows.clone()

    def finish_window(self, rows: int) -> None:
        """The next `rows` rows have gone through all layers."""
        if self.under_way is not None:
            rest = self.under_way[rows:]
            self.under_way = rest.clone() if len(rest) else None  # a view would keep all of them
