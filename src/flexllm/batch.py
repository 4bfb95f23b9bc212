"""FusedBatch: one iteration's rows as tensors. Decode rows, then prefill rows, then finetuning rows; no row knows its kind.

Legend: N rows, D decoding requests, C longest decode context, S sampled rows, hd head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexllm.core import InferenceChunk, Request, Sequence, StepPlan, TokenWindow
from flexllm.memory.activations import SequenceState
from flexllm.memory.kv_cache import KVCache
from flexllm.peft.pool import AdapterPool, AdapterSlot, BoundAdapters, Owner


@dataclass(frozen=True)
class AttentionChunk:
    """Rows [row, row + rows) of the batch, which are the last `rows` of the `slots` [b] positions they may see."""

    row: int
    rows: int
    slots: Tensor  # [b] int64


@dataclass(frozen=True)
class WindowRows:
    """A window's place in the batch."""

    row: int
    window: TokenWindow
    state: SequenceState

    @property
    def span(self) -> slice:
        return slice(self.row, self.row + self.window.rows)


@dataclass(frozen=True)
class FusedBatch:
    token_ids: Tensor  # [N] int64; -1: a virtual token
    positions: Tensor  # [N] int64
    slots: Tensor  # [N] int64: where each row's K and V go
    num_decode: int
    decode_slots: Tensor  # [D, C] int64
    decode_lengths: Tensor  # [D] int64
    chunks: tuple[AttentionChunk, ...]  # prefill chunks, then windows
    windows: tuple[WindowRows, ...]  # by the layer they go on from
    sampled_rows: Tensor  # [S] int64
    sampled: tuple[Request, ...]  # whose rows those are
    prompt_logprob_chunks: tuple[tuple[int, InferenceChunk], ...]  # (first row, chunk) of requests that ask for them
    adapters: BoundAdapters
    tables: Mapping[str, Any]  # cos, sin [N, hd], and those of the adapters
    with_windows: Callable[[int], FusedBatch]  # its first rows: those of the requests and of so many windows (there have to be some)

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    @staticmethod
    def build(
        plan: StepPlan, cache: KVCache, pool: AdapterPool, rope: tuple[Tensor, Tensor], states: Mapping[Sequence, SequenceState]
    ) -> FusedBatch:
        """`rope`: cos and sin of every position [max_len, hd]. `states`: the trainer's side of each sequence in the plan."""
        in_order = tuple(sorted(plan.windows, key=lambda w: w.layer))
        rows = _Rows(cache)
        decode = list(takewhile(lambda c: c.is_decode, plan.inference))
        for chunk in plan.inference:
            request = chunk.request
            slot = pool.slots[request.adapter_slot] if request.adapter_slot >= 0 else None
            tokens = [request.token_at(i) for i in range(chunk.start, chunk.end)]
            rows.place(tokens, request.blocks, chunk.start, slot, own_attention=rows.count >= len(decode))
        windows = []
        for window in in_order:
            state = states[window.sequence]
            windows.append(WindowRows(rows.count, window, state))
            ids = state.ids[window.start : window.end]
            rows.place(ids, window.sequence.blocks, window.start, state.slot, own_attention=True, dropout_seed=state.dropout_seed)
        firsts = np.cumsum([0, *(c.rows for c in plan.inference)])
        sampled = [(int(last) - 1, c.request) for last, c in zip(firsts[1:], plan.inference, strict=True) if c.sample]
        logprobs = [
            (int(first), c) for first, c in zip(firsts[:-1], plan.inference, strict=True) if c.request.sampling.prompt_logprobs is not None
        ]

        device = cache.device
        lengths = [c.end for c in decode]
        decode_slots = cache.padded_slots([c.request.blocks for c in decode], lengths) if decode else np.zeros((0, 0), np.int64)
        positions = torch.from_numpy(np.concatenate(rows.positions)).to(device)
        adapters = pool.bind(rows.owners, rows.count)
        return FusedBatch(
            token_ids=torch.from_numpy(np.concatenate(rows.ids)).to(device),
            positions=positions,
            slots=torch.from_numpy(np.concatenate(rows.slots)).to(device),
            num_decode=len(decode),
            decode_slots=torch.from_numpy(decode_slots).to(device),
            decode_lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
            chunks=tuple(rows.chunks),
            windows=tuple(windows),
            sampled_rows=torch.tensor([r for r, _ in sampled], dtype=torch.int64, device=device),
            sampled=tuple(r for _, r in sampled),
            prompt_logprob_chunks=tuple(logprobs),
            adapters=adapters,
            tables={"cos": rope[0][positions], "sin": rope[1][positions], **adapters.tables},
            with_windows=lambda n: FusedBatch.build(plan.cut(in_order[:n]), cache, pool, rope, states),
        )


class _Rows:
    """Collects the flat token axis, owner by owner."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.count = cache, 0
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.chunks: list[AttentionChunk] = []
        self.owners: list[Owner] = []

    def place(
        self,
        tokens: SequenceOf[int] | np.ndarray,
        blocks: list[int],
        start: int,
        slot: AdapterSlot | None,
        own_attention: bool,
        dropout_seed: int | None = None,
    ) -> None:
        """Rows for `tokens` at positions start.. of the owner of `blocks`. Decode rows share one attention call, others have their own."""
        end = start + len(tokens)
        self.ids.append(np.asarray(tokens, dtype=np.int64))
        self.positions.append(np.arange(start, end))
        if own_attention:
            seen = self.cache.slots(blocks, 0, end)
            self.slots.append(seen[start:])
            self.chunks.append(AttentionChunk(self.count, end - start, torch.from_numpy(seen).to(self.cache.device)))
        else:
            self.slots.append(self.cache.slots(blocks, start, end))
        if slot is not None:
            self.owners.append(Owner(slot, self.count, self.count + end - start, start, dropout_seed))
        self.count += end - start
