"""K and V of every position in flight, in pages shared by requests and training sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexllm.memory.lazy import lazy_zeros


class KVCache:
    """Per layer, `k[layer]` and `v[layer]` are [num_slots, K, hd]; slot = block * block_size + offset.

    Which blocks belong to whom is the BlockPool's business (memory/block_pool.py).
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.num_slots = block_size, num_blocks * block_size
        # zeros, not empty: a padded read must never meet a NaN
        store = [lazy_zeros(2, self.num_slots, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]
        self.k, self.v = [s[0] for s in store], [s[1] for s in store]
        self.device = device

    @staticmethod
    def bytes_per_token(num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * kv_heads * head_dim * dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return sum(t[: self.block_size].nbytes for t in (*self.k, *self.v))

    def slots(self, blocks: Sequence[int], start: int, end: int) -> np.ndarray:
        """Slots of positions [start, end) of the owner of `blocks`; int64 [end - start]."""
        first, last = start // self.block_size, -(-end // self.block_size)
        table = np.asarray(blocks[first:last], dtype=np.int64)
        slots = (table[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        return slots[start - first * self.block_size : end - first * self.block_size]

    def padded_slots(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> np.ndarray:
        """[B, max(lengths)] slots of positions 0.. of each owner, padded with its own first slots."""
        width = -(-max(lengths) // self.block_size)
        rows = np.empty((len(tables), width), dtype=np.int64)
        for i, (blocks, length) in enumerate(zip(tables, lengths, strict=True)):
            used = -(-length // self.block_size)
            rows[i, :used] = blocks[:used]
            rows[i, used:] = blocks[0]
        return (rows[:, :, None] * self.block_size + np.arange(self.block_size)).reshape(len(tables), -1)[:, : max(lengths)]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [N, K*hd] into `slots` [N]."""
        shape = (k.shape[0], *self.k[layer].shape[1:])
        self.k[layer].index_copy_(0, slots, k.view(shape) if k.is_contiguous() else k.reshape(shape))
        self.v[layer].index_copy_(0, slots, v.reshape(shape))

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [b, K, hd] at `slots` [b]."""
        return self.k[layer].index_select(0, slots), self.v[layer].index_select(0, slots)
