"""The backward half: slices of (layer, rows), last row first, layer by layer (algorithms.md 2.1, 2.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexllm.core import BackwardSlice, Sequence, SlicePart
from flexllm.finetune.optimizer import GradientLedger
from flexllm.memory.activations import SequenceState
from flexllm.memory.kv_cache import KVCache
from flexllm.model.decoder import Decoder
from flexllm.ops.reference import compute_dtype
from flexllm.peft.pool import AdapterPool


class BackwardContext:
    """What a layer's backward touches besides its rows: pages, dK/dV accumulators, and the job's gradients."""

    def __init__(self, model: Decoder, cache: KVCache, work: BackwardSlice, states: list[SequenceState], ledger: GradientLedger) -> None:
        self.model, self.cache, self.work, self.states, self.ledger = model, cache, work, states, ledger

    def gradient(self, name: str, value: Tensor) -> None:
        self.ledger.add(f"layers.{self.work.layer}.{name}", value)

    def attend_backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """do, q, o [s, H*hd], lse [s, H], the parts' rows one after another. Returns dq [s, H*hd] and the finished rows of dK, dV
        [s, K*hd], exact because every later row of the layer was here before."""
        head_dim = self.model.config.head_dim
        do, q, o = (t.unflatten(-1, (-1, head_dim)) for t in (do, q, o))
        done = []
        row = 0
        for part, state in zip(self.work.parts, self.states, strict=True):
            span = slice(row, row + part.rows)
            done.append(self._attend_part(part, state, do[span], q[span], o[span], lse[span]))
            row += part.rows
        dq, dk, dv = (torch.cat(g) if len(g) > 1 else g[0] for g in zip(*done, strict=True))
        return dq, dk, dv

    def _attend_part(
        self, part: SlicePart, state: SequenceState, do: Tensor, q: Tensor, o: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.from_numpy(self.cache.slots(part.sequence.blocks, 0, part.end)).to(q.device)
        k, v = self.cache.gather(self.work.layer, slots)
        dq, dk, dv = self.model.kernels.window_attention_backward(do, q, k, v, o, lse, self.model.attention_scale)
        if part.rows < part.sequence.length:  # the layer comes in several slices: accumulate over the prefix
            if state.kv_grad is None:
                assert part.end == part.sequence.length, "a layer starts at its last row"
                dtype = compute_dtype(q.dtype)
                state.kv_grad = torch.zeros(2, part.sequence.length, *k.shape[1:], dtype=dtype, device=q.device)
            state.kv_grad[0, : part.end] += dk
            state.kv_grad[1, : part.end] += dv
            dk, dv = state.kv_grad[:, part.start : part.end]
            if part.start == 0:
                state.kv_grad = None
        return dq.flatten(1), dk.to(q.dtype).flatten(1), dv.to(q.dtype).flatten(1)


def run_slice(
    model: Decoder, cache: KVCache, pool: AdapterPool, work: BackwardSlice, states: Mapping[Sequence, SequenceState], ledger: GradientLedger
) -> None:
    """Take `work.parts` through layer `work.layer`: `grad` rows become the gradient of the layer's input."""
    parts = [states[p.sequence] for p in work.parts]
    first = parts[0]
    assert first.program is not None, "backward of a sequence that only goes forward"
    assert all(s.slot is first.slot for s in parts), "a slice belongs to one job"
    spans = [slice(p.start, p.end) for p in work.parts]
    grads = [s.grad for s in parts if s.grad is not None]
    assert len(grads) == len(parts), "backward before forward"
    stored = [s.store.read(work.layer, p.start, p.end) for s, p in zip(parts, work.parts, strict=True)]
    saved = stored[0] if len(stored) == 1 else {name: torch.cat([rows[name] for rows in stored]) for name in stored[0]}
    positions = torch.cat([torch.arange(p.start, p.end, device=model.device) for p in work.parts])
    tables = {"cos": model.rope[0][positions], "sin": model.rope[1][positions], "lora": first.slot.config.scale}
    dy = grads[0][spans[0]] if len(parts) == 1 else torch.cat([g[s] for g, s in zip(grads, spans, strict=True)])

    context = BackwardContext(model, cache, work, parts, ledger)
    backward = first.program.layer(work.layer).emitted.function
    dx = backward(dy, saved, model.layers[work.layer], pool.rows(first.slot, work.layer), tables, context)

    row = 0
    for part, state, grad in zip(work.parts, parts, grads, strict=True):
        if dx is not None:
            grad[part.start : part.end] = dx[row : row + part.rows]
        row += part.rows
        if part.start == 0:
            state.store.free(work.layer)
            if work.layer == first.program.lowest_layer:
                state.grad = None
