"""The saved set of one training sequence: what the compiled forward keeps for the compiled backward."""

from __future__ import annotations

import torch
from torch import Tensor

from flexllm.compiler.remat import SavedTensor


class ActivationStore:
    """Per layer and name a tensor [length, columns], indexed by absolute position; allocated at the first write of a layer,
    freed when the layer's backward is done. `bytes` is what is held now."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self._layers: dict[int, dict[str, Tensor]] = {}
        self.bytes = 0

    def allocate(self, layer: int, saved: tuple[SavedTensor, ...]) -> None:
        """Make room for a layer's saved set, if it is not there yet."""
        if layer in self._layers:
            return
        full = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._layers[layer] = {
            t.name: torch.empty(self.length, t.columns, dtype=full if t.fp32 else self.dtype, device=self.device) for t in saved
        }
        self.bytes += sum(t.nbytes for t in self._layers[layer].values())

    def write(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        self._layers[layer][name][start : start + rows.shape[0]] = rows

    def wants(self, layer: int, name: str) -> bool:
        return name in self._layers.get(layer, ())

    def read(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        return {name: t[start:end] for name, t in self._layers[layer].items()}

    def free(self, layer: int) -> None:
        self.bytes -= sum(t.nbytes for t in self._layers.pop(layer, {}).values())

    def check_integrity(self) -> None:
        assert self.bytes == sum(t.nbytes for layer in self._layers.values() for t in layer.values())
