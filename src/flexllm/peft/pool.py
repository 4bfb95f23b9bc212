"""All resident adapters side by side, so that one program serves any mixture of them (algorithms.md section 5).

Per kind of adapter, layer and site: rank-pooled parameters whose rows are divided among the adapters, slot-pooled ones with a
row per adapter (peft/base.py says which is which).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexllm.memory.lazy import lazy_zeros
from flexllm.model.config import ModelConfig
from flexllm.model.layer import SITES, site_shapes
from flexllm.peft import methods as methods  # makes them known
from flexllm.peft.base import Binding, Parameter, PeftMethod, method_of
from flexllm.peft.config import PeftConfig


@dataclass(frozen=True, eq=False)
class AdapterSlot:
    """Rows [start, end) of its kind's rank-pooled parameters, row `index` of the slot-pooled ones. Where it does not attach
    they are zero or neutral."""

    id: int
    config: PeftConfig
    method: PeftMethod
    kind: str
    start: int
    index: int

    @cached_property
    def rank(self) -> int:
        return self.method.rank(self.config)

    @property
    def end(self) -> int:
        return self.start + self.rank

    @property
    def virtual_tokens(self) -> int:
        return self.config.num_virtual_tokens

    @cached_property
    def features(self) -> frozenset[str]:
        return self.method.features(self.config)


class Owner(NamedTuple):
    """Rows [first, last) of a batch belong to `slot`; they are at positions `position`... of their sequence."""

    slot: AdapterSlot
    first: int
    last: int
    position: int
    dropout_seed: int | None = None  # None: nothing is dropped (requests, validation)


@dataclass(frozen=True)
class BoundAdapters:
    """What one batch touches of the pool."""

    bindings: tuple[Binding, ...]
    parameters: Sequence[Mapping[str, Tensor]]  # per layer: "<kind>.<site>.<name>" -> rows of all the batch's adapters
    first_rank: Mapping[str, int]  # by kind: the pool row that is row 0 of those
    tables: Mapping[str, Any]  # by "<kind>.<table>"


class PoolFullError(RuntimeError):
    """No run of free rank rows is long enough, or no slot is left; unload an adapter."""


class _KindPool:
    """The parameters of one kind of adapter. A tensor exists once an adapter has needed it."""

    def __init__(self, model: ModelConfig, ranks: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.ranks, self.num_slots, self.dtype, self.device = model, ranks, slots, dtype, device
        self.slots: dict[int, AdapterSlot] = {}
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(model.num_layers)]
        self.declared: dict[str, Parameter] = {}  # by "<site>.<name>"

    def place(self, rank: int) -> tuple[int, int]:
        """(first of `rank` free rows, free slot index)."""
        start = 0
        for slot in sorted(self.slots.values(), key=lambda s: s.start):
            if slot.start - start >= rank:
                break
            start = slot.end
        index = next(i for i in range(1, len(self.slots) + 2) if all(s.index != i for s in self.slots.values()))
        if start + rank > self.ranks or index >= self.num_slots:
            used = sum(s.rank for s in self.slots.values())
            raise PoolFullError(
                f"no room for an adapter of rank {rank}: {used} of {self.ranks} rank rows and {len(self.slots)} of {self.num_slots - 1} "
                "slots are in use"
            )
        return start, index

    def declare(self, parameters: Mapping[str, Parameter]) -> bool:
        """Make the tensors that are not there yet; whether there were any."""
        new = {key: p for key, p in parameters.items() if key not in self.declared}
        for key, parameter in new.items():
            self.declared[key] = parameter
            rows = self.ranks if parameter.pooling == "rank" else self.num_slots
            shared = self._new(rows, parameter) if parameter.shared else None
            for layer in self.layers:
                layer[key] = shared if shared is not None else self._new(rows, parameter)
        return bool(new)

    def _new(self, rows: int, parameter: Parameter) -> Tensor:
        tensor = lazy_zeros(rows, parameter.width, dtype=self.dtype, device=self.device)
        return tensor.fill_(parameter.neutral) if parameter.neutral else tensor

    def range(self, start: int, end: int) -> list[dict[str, Tensor]]:
        """Per layer, rows [start, end) of what is rank-pooled and all of the rest."""
        ranked = {k for k, p in self.declared.items() if p.pooling == "rank"}
        return [{k: v[start:end] if k in ranked else v for k, v in layer.items()} for layer in self.layers]


@dataclass
class AdapterPool:
    """`capacity` is the sum of ranks that may be resident at once in each kind, `max_slots` the number of adapters."""

    model: ModelConfig
    capacity: int
    dtype: torch.dtype
    device: torch.device
    max_slots: int = 64
    slots: dict[int, AdapterSlot] = field(default_factory=dict)
    _kinds: dict[str, _KindPool] = field(default_factory=dict)
    _bound: dict[tuple[Any, ...], tuple[Mapping[str, Tensor], ...]] = field(default_factory=dict)  # views, costlier to build than to use
    _declarations: dict[tuple[PeftMethod, frozenset[str], int], dict[str, Parameter]] = field(default_factory=dict)
    _next_id: int = 0

    # --------------------------------------------------------------------------------------------------- coming and going
    def allocate(self, config: PeftConfig) -> AdapterSlot:
        """A neutral slot. PoolFullError when no free run of rows, or no slot, is left."""
        method = method_of(config)
        kind = method.kind(config)
        if kind not in self._kinds:
            self._kinds[kind] = _KindPool(self.model, self.capacity, self.max_slots + 1, self.dtype, self.device)
        pool = self._kinds[kind]
        start, index = pool.place(method.rank(config))
        slot = AdapterSlot(self._next_id, config, method, kind, start, index)
        self._next_id += 1
        pool.declare(self.declared(slot))
        pool.slots[slot.id] = self.slots[slot.id] = slot
        self._bound.clear()
        for layer in pool.layers:
            for key, tensor in layer.items():
                self._own(pool, slot, key, tensor).fill_(pool.declared[key].neutral)
        return slot

    def free(self, slot: AdapterSlot) -> None:
        del self.slots[slot.id], self._kinds[slot.kind].slots[slot.id]

    def declared(self, slot: AdapterSlot) -> dict[str, Parameter]:
        """The parameters of one adapter at a layer that it adapts, by "<site>.<name>"."""
        return self._declared(slot.method, slot.features, slot.rank)

    def _declared(self, method: PeftMethod, features: frozenset[str], rank: int = 1) -> dict[str, Parameter]:
        key = (method, features, rank)
        if key not in self._declarations:
            shapes = site_shapes(self.model)
            found = {site: method.parameters(site, *shapes[site], rank, features) for site in SITES}
            self._declarations[key] = {f"{site}.{name}": p for site, parameters in found.items() for name, p in parameters.items()}
        return self._declarations[key]

    # ------------------------------------------------------------------------------------------------------- one adapter
    def write(self, slot: AdapterSlot, tensors: Mapping[str, Tensor]) -> None:
        """Parameters by "layers.<n>.<site>.<name>"."""
        pool = self._kinds[slot.kind]
        for name, tensor in tensors.items():
            _, layer, key = name.split(".", 2)
            self._own(pool, slot, key, pool.layers[int(layer)][key]).copy_(tensor)

    def rows(self, slot: AdapterSlot, layer: int) -> dict[str, Tensor]:
        """The adapter's own rows at one layer by "<site>.<name>", buffers too; views."""
        pool = self._kinds[slot.kind]
        return {key: self._own(pool, slot, key, pool.layers[layer][key]) for key in self.declared(slot)}

    def bound_rows(self, slot: AdapterSlot, layer: int) -> dict[str, Tensor]:
        """The same under the names that compiled functions use."""
        key = ("own", slot.id)
        if key not in self._bound:
            self._bound[key] = tuple({f"{slot.kind}.{k}": v for k, v in self.rows(slot, i).items()} for i in range(self.model.num_layers))
        return self._bound[key][layer]  # type: ignore[return-value]

    @staticmethod
    def own_bindings(slot: AdapterSlot) -> tuple[Binding, ...]:
        """What a forward of this adapter's rows alone is compiled for."""
        return (Binding(slot.kind, slot.method, slot.features),)

    def parameters(self, slot: AdapterSlot, trainable: bool = True) -> dict[str, Tensor]:
        """Its live parameters by "layers.<n>.<site>.<name>", or its buffers; views."""
        declared = self.declared(slot)
        layers = slot.config.layers(self.model.num_layers)
        return {f"layers.{i}.{k}": v for i in layers for k, v in self.rows(slot, i).items() if declared[k].trainable == trainable}

    def _own(self, pool: _KindPool, slot: AdapterSlot, key: str, tensor: Tensor) -> Tensor:
        return tensor[slot.start : slot.end] if pool.declared[key].pooling == "rank" else tensor[slot.index : slot.index + 1]

    # ---------------------------------------------------------------------------------------------------------- a batch
    def bind(self, owners: Iterable[Owner], num_rows: int) -> BoundAdapters:
        """The adapters of a batch whose rows are owned so; rows of no owner are not adapted."""
        by_kind: dict[str, list[Owner]] = {}
        for owner in owners:
            by_kind.setdefault(owner.slot.kind, []).append(owner)
        bindings, first_rank, ranges = [], dict[str, int](), []
        tables: dict[str, Any] = {}
        for kind in sorted(by_kind):
            group = by_kind[kind]
            slots = {o.slot.id: o.slot for o in group}.values()
            start, end = min(s.start for s in slots), max(s.end for s in slots)
            features = frozenset().union(*(s.features for s in slots))
            method = next(iter(slots)).method
            if self._kinds[kind].declare(self._declared(method, features)):  # one has at its sites what another lacks at its own
                self._bound.clear()
            bindings.append(Binding(kind, method, features))
            first_rank[kind] = start
            ranges.append((kind, start, end))
            tables |= {f"{kind}.{name}": table for name, table in self._tables(group, num_rows, start, end, features).items()}
        return BoundAdapters(tuple(bindings), self._parameters(tuple(ranges)), first_rank, tables)

    def _parameters(self, ranges: tuple[tuple[str, int, int], ...]) -> tuple[Mapping[str, Tensor], ...]:
        if ranges not in self._bound:
            if len(self._bound) > 64:
                self._bound.clear()
            views = [(kind, self._kinds[kind].range(start, end)) for kind, start, end in ranges]
            self._bound[ranges] = tuple(
                {f"{kind}.{k}": v for kind, layers in views for k, v in layers[i].items()} for i in range(self.model.num_layers)
            )
        return self._bound[ranges]

    def _tables(self, owners: list[Owner], num_rows: int, start: int, end: int, features: frozenset[str]) -> dict[str, Any]:
        """mask [N, end - start]: a row of an owner holds its scale in the owner's rank columns; slot [N] int64; rows [N] int64: the
        pooled row that a virtual token stands for, else -1; dropout: seeds [N] int64 and rates [N]."""
        slot = torch.zeros(num_rows, dtype=torch.int64)
        tables: dict[str, Any] = {"slot": slot}
        virtual = owners[0].slot.virtual_tokens
        if virtual:
            rows = torch.full((num_rows,), -1, dtype=torch.int64)
            tables["rows"] = rows
        elif end > start:
            mask = torch.zeros(num_rows, end - start, dtype=self.dtype)
            tables["mask"] = mask
        if "dropout" in features:
            seeds, rates = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows)
        for o in owners:
            span = slice(o.first, o.last)
            slot[span] = o.slot.index
            if virtual:
                rows[span] = virtual_rows(o.position, o.last - o.first, o.slot.virtual_tokens, o.slot.start - start)
            elif end > start:
                mask[span, o.slot.start - start : o.slot.end - start] = o.slot.method.scale(o.slot.config)
            if "dropout" in features and o.dropout_seed is not None:
                seeds[span] = dropout_seeds(o.dropout_seed, o.position, o.last - o.first)
                rates[span] = o.slot.config.dropout
        if "dropout" in features:
            tables["dropout"] = (seeds.to(self.device), rates.to(self.device))
        for name in ("slot", "rows", "mask"):
            if name in tables:
                tables[name] = tables[name].to(self.device)
        return tables

    def check_integrity(self) -> None:
        for pool in self._kinds.values():
            at = 0
            for slot in sorted(pool.slots.values(), key=lambda s: (s.start, s.end)):
                assert slot.start >= at, "two adapters share rank rows"
                at = slot.end
            assert at <= self.capacity
            indices = [s.index for s in pool.slots.values()]
            assert len({0, *indices}) == len(indices) + 1, "two adapters share a slot, or one has the neutral one"


def virtual_rows(position: int, count: int, tokens: int, first: int = 0) -> Tensor:
    """[count] int64 for positions `position`...: `first` + the virtual token that stands there, -1 where a real one does."""
    at = torch.arange(position, position + count)
    return torch.where(at < tokens, at + first, -1)


def dropout_seeds(seed: int, position: int, count: int) -> Tensor:
    """[count] int64: a seed of each row's own."""
    return (torch.arange(position, position + count) + 1) * 0x5851F42D4C957F2D + seed


def own_tables(owners: Iterable[Owner], features: frozenset[str], device: torch.device) -> dict[str, Any]:
    """Tables of rows that all belong to one adapter, whose parameters are bound alone: constants where they can be."""
    owners = list(owners)
    slot = owners[0].slot
    tables: dict[str, Any] = {"mask": slot.method.scale(slot.config), "slot": 0}
    if slot.virtual_tokens:
        tables["rows"] = torch.cat([virtual_rows(o.position, o.last - o.first, slot.virtual_tokens) for o in owners]).to(device)
    if "dropout" in features:
        seeds = torch.cat([dropout_seeds(o.dropout_seed or 0, o.position, o.last - o.first) for o in owners])
        tables["dropout"] = (seeds.to(device), torch.full(seeds.shape, slot.config.dropout).to(device))
    return {f"{slot.kind}.{name}": table for name, table in tables.items()}
