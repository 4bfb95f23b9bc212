"""All resident adapters side by side: for each layer and site one A and one B whose rows are divided among the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexllm.config import LoraConfig
from flexllm.memory.lazy import lazy_zeros
from flexllm.model.config import ModelConfig
from flexllm.model.layer import SITES, site_shapes


@dataclass(frozen=True, eq=False)
class AdapterSlot:
    """Rows [start, start + rank) of the pool. At sites it does not adapt they are zero."""

    id: int
    start: int
    config: LoraConfig

    @property
    def rank(self) -> int:
        return self.config.r

    @property
    def end(self) -> int:
        return self.start + self.config.r


class PoolFullError(RuntimeError):
    """No run of free rank rows is long enough; unload an adapter."""


@dataclass
class AdapterPool:
    """Per layer and site, A [capacity, in] and B [capacity, out] (B transposed, see peft/lora.py).

    `capacity` is the sum of ranks that may be resident at once.
    """

    model: ModelConfig
    capacity: int
    dtype: torch.dtype
    device: torch.device
    slots: dict[int, AdapterSlot] = field(default_factory=dict)
    _next_id: int = 0

    def __post_init__(self) -> None:
        shapes = site_shapes(self.model)
        self._layers: list[dict[str, Tensor]] = [
            {
                f"{site}.{name}": lazy_zeros(self.capacity, size, dtype=self.dtype, device=self.device)
                for site in SITES
                for name, size in (("A", shapes[site][1]), ("B", shapes[site][0]))
            }
            for _ in range(self.model.num_layers)
        ]
        self._views: dict[tuple[int, int], list[dict[str, Tensor]]] = {}

    def allocate(self, config: LoraConfig) -> AdapterSlot:
        """A zeroed slot. PoolFullError when no free run of `config.r` rows is left."""
        start = 0
        for slot in sorted(self.slots.values(), key=lambda s: s.start):
            if slot.start - start >= config.r:
                break
            start = slot.end
        if start + config.r > self.capacity:
            used = sum(s.rank for s in self.slots.values())
            raise PoolFullError(f"no room for an adapter of rank {config.r}: {used} of {self.capacity} rank rows are in use")
        slot = AdapterSlot(self._next_id, start, config)
        self._next_id += 1
        self.slots[slot.id] = slot
        for layer in self._layers:
            for tensor in layer.values():
                tensor[slot.start : slot.end].zero_()
        return slot

    def free(self, slot: AdapterSlot) -> None:
        del self.slots[slot.id]

    def write(self, slot: AdapterSlot, tensors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> None:
        """(layer, site) -> (A [r, in], B [out, r]) as PEFT has them."""
        for (layer, site), (a, b) in tensors.items():
            self._layers[layer][f"{site}.A"][slot.start : slot.end] = a.to(self.dtype)
            self._layers[layer][f"{site}.B"][slot.start : slot.end] = b.t().to(self.dtype)

    def rows(self, slot: AdapterSlot, layer: int) -> dict[str, Tensor]:
        """The live parameters of one adapter at one layer: "<site>.A" -> [r, in], "<site>.B" -> [r, out]; views."""
        return {k: v for k, v in self.range(slot.start, slot.end)[layer].items() if k.split(".")[0] in slot.config.target_modules}

    def parameters(self, slot: AdapterSlot) -> dict[str, Tensor]:
        """All live parameters of an adapter by "layers.<n>.<site>.<A|B>"; views."""
        return {f"layers.{i}.{k}": v for i in range(len(self._layers)) for k, v in self.rows(slot, i).items()}

    def export(self, parameters: Mapping[str, Tensor]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """Parameters named as above -> (layer, site) -> (A [r, in], B [out, r]) as PEFT has them; copies."""
        out = {}
        for name, a in parameters.items():
            _, layer, site, which = name.split(".")
            if which == "A":
                b = parameters[f"layers.{layer}.{site}.B"]
                out[int(layer), site] = (a.detach().clone(), b.detach().t().clone(memory_format=torch.contiguous_format))
        return out

    def range(self, start: int, end: int) -> list[dict[str, Tensor]]:
        """Rows [start, end) of every tensor, per layer; the views are kept, for building them costs more than using them."""
        key = (start, end)
        if key not in self._views:
            if len(self._views) > 64:
                self._views.clear()
            self._views[key] = [{k: v[start:end] for k, v in layer.items()} for layer in self._layers]
        return self._views[key]

    def rank_mask(self, owners: Iterable[tuple[AdapterSlot, int, int]], num_rows: int, start: int, end: int) -> Tensor:
        """M [num_rows, end - start]: row i of owner (slot, first row, last row + 1) holds its scale in the owner's rank columns."""
        mask = torch.zeros(num_rows, end - start, dtype=self.dtype, device=self.device)
        for slot, first, last in owners:
            mask[first:last, slot.start - start : slot.end - start] = slot.config.scale
        return mask

    def check_integrity(self) -> None:
        at = 0
        for slot in sorted(self.slots.values(), key=lambda s: s.start):
            assert slot.start >= at, "two adapters share rank rows"
            at = slot.end
        assert at <= self.capacity
