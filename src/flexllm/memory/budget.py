"""Bytes as numbers: what finetuning may hold besides K/V pages, and how free memory is divided at start."""

from __future__ import annotations

from flexllm.config import CacheConfig

KV_SHARE = 0.35  # of the memory free after the weights are loaded
FINETUNE_SHARE = 0.35  # the rest is for the temporaries of an iteration and for everyone else on the machine
MAX_CONTEXTS = 64  # no more pages than this many full contexts


class ByteBudget:
    """`total` bytes shared by named owners (a job's optimizer state, a sequence's saved activations, ...).

    Invariant: used == sum of what the owners hold <= total.
    """

    def __init__(self, total: int) -> None:
        if total < 0:
            raise ValueError(f"a byte budget cannot be negative, got {total}")
        self.total = total
        self.used = 0
        self._held: dict[str, int] = {}

    @property
    def free(self) -> int:
        return self.total - self.used

    def held_by(self, owner: str) -> int:
        return self._held.get(owner, 0)

    def reserve(self, owner: str, size: int) -> bool:
        """Add `size` bytes to what `owner` holds; False, and nothing changes, if they are not free."""
        assert size >= 0, size
        if size > self.free:
            return False
        self._held[owner] = self.held_by(owner) + size
        self.used += size
        return True

    def release(self, owner: str) -> int:
        """Give back all that `owner` holds; returns the bytes (0 for an unknown owner)."""
        size = self._held.pop(owner, 0)
        self.used -= size
        return size

    def check_integrity(self) -> None:
        assert self.used == sum(self._held.values())
        assert 0 <= self.used <= self.total


def size_caches(free_bytes: int, cache: CacheConfig, kv_bytes_per_token: int, max_model_len: int) -> tuple[int, int]:
    """Divide memory that is free after the weights are loaded: (number of K/V blocks, bytes for finetuning).

    What the config states is taken as it is. Otherwise each side gets its share, K/V no more than MAX_CONTEXTS full
    contexts. Raises ValueError if not even one block fits.
    """
    block_bytes = cache.block_size * kv_bytes_per_token
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
    elif cache.kv_bytes is not None:
        num_blocks = cache.kv_bytes // block_bytes
    else:
        blocks_per_context = -(-max_model_len // cache.block_size)
        num_blocks = min(int(free_bytes * KV_SHARE) // block_bytes, MAX_CONTEXTS * blocks_per_context)
    if num_blocks < 1:
        raise ValueError(f"no room for the K/V cache: a block takes {block_bytes} bytes, {cache.kv_bytes or free_bytes} bytes are free")
    finetune_bytes = cache.finetune_bytes if cache.finetune_bytes is not None else int(free_bytes * FINETUNE_SHARE)
    return num_blocks, finetune_bytes
