"""Adapters that requests may name: where their files are, which are resident, who is using them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flexllm.model.config import ModelConfig
from flexllm.peft.base import method_of
from flexllm.peft.config import PeftConfig
from flexllm.peft.io import load_adapter
from flexllm.peft.pool import AdapterPool, AdapterSlot, PoolFullError


@dataclass(eq=False)
class _Version:
    """One adapter folder. Requests pin the version they started with; a replaced version goes when its last user has."""

    path: Path
    slot: AdapterSlot | None = None
    users: int = 0
    last_used: int = 0
    retired: bool = False


@dataclass
class AdapterRegistry:
    """Files are read when an adapter is first used; the least recently used idle one makes room."""

    model: ModelConfig
    pool: AdapterPool
    max_resident: int
    refresh: Callable[[AdapterSlot], None]  # recomputes what an adapter's buffers derive from its parameters and the base weights
    _by_name: dict[str, _Version] = field(default_factory=dict)
    _by_slot: dict[int, _Version] = field(default_factory=dict)
    _clock: int = 0

    def register(self, name: str, path: str | Path) -> None:
        """Check the PEFT folder against the model (ValueError) and make it known under `name`, replacing what was."""
        config = load_adapter(path).fitted(self.model).config
        rank = method_of(config).rank(config)
        if rank > self.pool.capacity:
            raise ValueError(f"adapter {name!r} has rank {rank}; this server holds {self.pool.capacity} rank rows in all")
        self.unregister(name)
        self._by_name[name] = _Version(Path(path))

    def unregister(self, name: str) -> None:
        version = self._by_name.pop(name, None)
        if version is not None:
            version.retired = True
            self._evict_if_idle(version)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def resident(self) -> int:
        return len(self._by_slot)

    def acquire(self, name: str) -> AdapterSlot:
        """Pin the adapter for one request. ValueError: unknown or unreadable; PoolFullError: every resident adapter is in use."""
        if name not in self._by_name:
            raise ValueError(f"unknown adapter {name!r}")
        version = self._by_name[name]
        if version.slot is None:
            adapter = load_adapter(version.path).fitted(self.model)
            version.slot = self._allocate(adapter.config)
            self.pool.write(version.slot, adapter.tensors)
            self.refresh(version.slot)
            self._by_slot[version.slot.id] = version
        version.users += 1
        self._clock += 1
        version.last_used = self._clock
        return version.slot

    def release(self, slot_id: int) -> None:
        version = self._by_slot[slot_id]
        version.users -= 1
        assert version.users >= 0, "an adapter was released more often than acquired"
        if version.retired:
            self._evict_if_idle(version)

    def allocate_for_training(self, config: PeftConfig) -> AdapterSlot:
        """A zeroed slot of a job's own; idle serving adapters make room. The job frees it in the pool."""
        return self._allocate(config)

    def _allocate(self, config: PeftConfig) -> AdapterSlot:
        while True:
            try:
                if len(self._by_slot) < self.max_resident:
                    return self.pool.allocate(config)
            except PoolFullError:
                pass
            idle = [v for v in self._by_slot.values() if v.users == 0]
            if not idle:
                rank = method_of(config).rank(config)
                raise PoolFullError(f"no room for an adapter of rank {rank}: all {self.resident} resident ones are in use")
            self._evict_if_idle(min(idle, key=lambda v: v.last_used))

    def _evict_if_idle(self, version: _Version) -> None:
        if version.slot is not None and version.users == 0:
            del self._by_slot[version.slot.id]
            self.pool.free(version.slot)
            version.slot = None
