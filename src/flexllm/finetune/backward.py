"""The backward half: slices of (layers, rows), last row first, from the top layer down (algorithms.md 2.1, 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flexllm.compiler.levels import LevelProgram
from flexllm.core import BackwardSlice, Sequence, SlicePart
from flexllm.finetune.optimizer import GradientLedger
from flexllm.memory.activations import SequenceState
from flexllm.memory.kv_cache import KVCache
from flexllm.model.decoder import Decoder
from flexllm.ops.reference import compute_dtype
from flexllm.peft.pool import AdapterPool, Owner, own_tables

Saved = dict[str, Tensor]


class SliceContext:
    """What the layers' functions touch besides a slice's rows: pages, dK/dV accumulators, the job's gradients, and, while a
    segment is rebuilt, what its layers save."""

    def __init__(self, model: Decoder, cache: KVCache, work: BackwardSlice, states: list[SequenceState], ledger: GradientLedger) -> None:
        self.model, self.cache, self.work, self.states, self.ledger = model, cache, work, states, ledger
        self.layer = work.layer
        self.rebuilt: dict[int, Saved] = {}
        self._slots = [torch.from_numpy(cache.slots(p.sequence.blocks, 0, p.end)).to(model.device) for p in work.parts]

    def gradient(self, name: str, value: Tensor) -> None:
        self.ledger.add(f"layers.{self.layer}.{name}", value)

    def save(self, name: str, value: Tensor) -> None:
        self.rebuilt.setdefault(self.layer, {})[name] = value

    def save_pooled(self, _kind: str, name: str, value: Tensor, pack: Callable[[Tensor], Tensor] | None = None) -> None:
        self.save(name, pack(value) if pack else value)  # the slice's adapter is alone: the columns are its own

    def attend(self, q: Tensor, _k: Tensor | None, _v: Tensor | None) -> tuple[Tensor, Tensor]:
        """The forward's attention again, from the pages. q [s, H*hd] -> o [s, H*hd], lse [s, H]."""
        heads = q.unflatten(-1, (-1, self.model.config.head_dim))
        outs, lses, row = [], [], 0
        for part, slots in zip(self.work.parts, self._slots, strict=True):
            k, v = self.cache.gather(self.layer, slots)
            o, lse = self.model.kernels.window_attention(heads[row : row + part.rows], k, v, self.model.attention_scale)
            outs.append(o)
            lses.append(lse)
            row += part.rows
        return _joined(outs).flatten(1), _joined(lses)

    def attend_backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """do, q, o [s, H*hd], lse [s, H], the parts' rows one after another. Returns dq [s, H*hd] and the finished rows of dK, dV
        [s, K*hd], exact because every later row of the layer was here before."""
        head_dim = self.model.config.head_dim
        do, q, o = (t.unflatten(-1, (-1, head_dim)) for t in (do, q, o))
        done, row = [], 0
        for part, state, slots in zip(self.work.parts, self.states, self._slots, strict=True):
            span = slice(row, row + part.rows)
            done.append(self._attend_part(part, state, slots, do[span], q[span], o[span], lse[span]))
            row += part.rows
        dq, dk, dv = (_joined(list(g)) for g in zip(*done, strict=True))
        return dq, dk, dv

    def _attend_part(
        self, part: SlicePart, state: SequenceState, slots: Tensor, do: Tensor, q: Tensor, o: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.cache.gather(self.layer, slots)
        dq, dk, dv = self.model.kernels.window_attention_backward(do, q, k, v, o, lse, self.model.attention_scale)
        if part.rows < part.sequence.length:  # the layer comes in several slices: accumulate over the prefix
            if self.layer not in state.kv_grad:
                assert part.end == part.sequence.length, "a layer starts at its last row"
                dtype = compute_dtype(q.dtype)
                state.kv_grad[self.layer] = torch.zeros(2, part.sequence.length, *k.shape[1:], dtype=dtype, device=q.device)
            total = state.kv_grad[self.layer]
            total[0, : part.end] += dk
            total[1, : part.end] += dv
            dk, dv = total[:, part.start : part.end]
            if part.start == 0:
                del state.kv_grad[self.layer]
        return dq.flatten(1), dk.to(q.dtype).flatten(1), dv.to(q.dtype).flatten(1)


def run_slice(
    model: Decoder, cache: KVCache, pool: AdapterPool, work: BackwardSlice, states: Mapping[Sequence, SequenceState], ledger: GradientLedger
) -> None:
    """Take `work.parts` down from layer `work.layer` to `work.lowest`: `grad` rows become the gradient of that layer's input."""
    parts = [states[p.sequence] for p in work.parts]
    slot, program = parts[0].slot, parts[0].program
    assert program is not None, "backward of a sequence that only goes forward"
    assert all(s.slot is slot and s.program is program for s in parts), "a slice belongs to one job and level"
    assert all(s.grad is not None for s in parts), "backward before forward"
    rows = [s.grad[p.start : p.end] for s, p in zip(parts, work.parts, strict=True) if s.grad is not None]
    dy: Tensor | None = _joined(rows)

    positions = torch.cat([torch.arange(p.start, p.end, device=model.device) for p in work.parts])
    owners, row = [], 0
    for part, state in zip(work.parts, parts, strict=True):
        owners.append(Owner(slot, row, row + part.rows, part.start, state.dropout_seed))
        row += part.rows
    tables = {"cos": model.rope[0][positions], "sin": model.rope[1][positions], **own_tables(owners, slot.features, model.device)}

    context = SliceContext(model, cache, work, parts, ledger)
    if program.depth > 1:
        _rebuild(model, pool, work, program, context, tables)
    for layer in range(work.layer, work.lowest - 1, -1):
        context.layer = layer
        saved = context.rebuilt.pop(layer, {}) if program.depth > 1 else _stored(parts, work, layer)
        backward = program.layer(layer).emitted.function
        dy = backward(dy, saved, model.layers[layer], pool.bound_rows(slot, layer), {**tables, "layer": layer}, context)

    row = 0
    for part, state, grad in zip(work.parts, parts, rows, strict=True):
        if dy is not None:
            grad.copy_(dy[row : row + part.rows])
        row += part.rows
        if part.start == 0:
            for layer in range(work.lowest, work.layer + 1):
                state.store.free(layer)
            if work.lowest == program.lowest_layer:
                state.grad = None


def _rebuild(
    model: Decoder, pool: AdapterPool, work: BackwardSlice, program: LevelProgram, context: SliceContext, tables: dict[str, object]
) -> None:
    """Run the slice's rows forward through its layers again, from what the lowest one stored or from the token ids."""
    slot = context.states[0].slot
    if work.lowest == 0:
        ids = [torch.from_numpy(s.ids[p.start : p.end].astype("int64")) for s, p in zip(context.states, work.parts, strict=True)]
        x = model.embedded(torch.cat(ids).to(model.device))
    else:
        x = _stored(context.states, work, work.lowest)["x"]
    for layer in range(work.lowest, work.layer + 1):
        context.layer = layer
        bindings = pool.own_bindings(slot)
        forward = model.programs.get(bindings, layer == 0, program.layer(layer).saved_names)
        x = forward(x, model.layers[layer], pool.bound_rows(slot, layer), {**tables, "layer": layer}, context)


def _stored(states: list[SequenceState], work: BackwardSlice, layer: int) -> Saved:
    """The slice's rows of what the forward stored for a layer."""
    stored = [s.store.read(layer, p.start, p.end) for s, p in zip(states, work.parts, strict=True)]
    return {name: _joined([rows[name] for rows in stored]) for name in stored[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
