"""Decode steps as CUDA graphs: launching a layer's kernels one by one takes several times as long as they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexllm.batch import FusedBatch
from flexllm.memory.kv_cache import KVCache
from flexllm.model.decoder import Decoder

FEWEST_KEYS = 512  # contexts are rounded up to this or to 4, 16, ... times as many, batches to powers of two
MAX_ROWS = 256
MAX_GRAPHS = 64


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: FusedBatch  # the tensors that it reads
    hidden: Tensor  # [rows, d], which it writes


class GraphedDecoder:
    """Runs batches through a model as `Decoder.forward` does; those of decode rows alone by replaying a graph of as many rows or more.

    A graph is captured when a batch of its size and adapters comes for the second time. Rows that are too many repeat the first one: they
    write what it writes where it writes it.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._graphs: dict[Hashable, _Graph | None] = {}  # None: seen once. The latest used comes last
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: FusedBatch, cache: KVCache, interrupted: Callable[[], bool] = lambda: False) -> Tensor:
        if not _can_be_captured(batch):
            return self._model.forward(batch, cache, interrupted)
        rows, keys = _size_of(batch)
        widths = tuple((name, table.shape[1:]) for name, table in sorted(batch.tables.items()))
        key = (rows, keys, batch.adapters.bindings, tuple(sorted(batch.adapters.first_rank.items())), widths)
        if key not in self._graphs:
            self._remember(key, None)
            return self._model.forward(batch, cache)
        graph = self._graphs.pop(key) or self._capture(batch, cache, rows, keys)
        self._remember(key, graph)
        _fill(graph.inputs, batch)
        graph.graph.replay()
        return graph.hidden[: batch.num_rows]

    def _remember(self, key: Hashable, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def _capture(self, batch: FusedBatch, cache: KVCache, rows: int, keys: int) -> _Graph:
        def room(t: Tensor) -> Tensor:
            return t.new_zeros(rows, *t.shape[1:])

        inputs = replace(
            batch,
            token_ids=room(batch.token_ids),
            positions=room(batch.positions),
            slots=room(batch.slots),
            num_decode=rows,
            decode_slots=batch.decode_slots.new_zeros(rows, keys),
            decode_lengths=room(batch.decode_lengths),
            tables={name: room(table) for name, table in batch.tables.items()},
        )
        _fill(inputs, batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._model.forward(inputs, cache)  # compiles what has to be compiled
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._model.forward(inputs, cache)
        return _Graph(graph, inputs, hidden)


def _can_be_captured(batch: FusedBatch) -> bool:
    """Virtual tokens and dropout are looked up on the host, or have tables of another form."""
    tables_alike = all(isinstance(t, Tensor) and not name.endswith(".rows") for name, t in batch.tables.items())
    return batch.num_rows == batch.num_decode <= MAX_ROWS and tables_alike


def _size_of(batch: FusedBatch) -> tuple[int, int]:
    """(rows, keys) of the graph for a batch."""
    rows, keys = 1 << (batch.num_rows - 1).bit_length(), FEWEST_KEYS
    while keys < batch.decode_slots.shape[1]:
        keys *= 4
    return rows, keys


def _fill(inputs: FusedBatch, batch: FusedBatch) -> None:
    n, keys = batch.num_rows, batch.decode_slots.shape[1]

    def fill(room: Tensor, rows: Tensor) -> None:
        room[:n].copy_(rows)
        if n < len(room):
            room[n:].copy_(rows[:1].expand(len(room) - n, *rows.shape[1:]))

    for name in ("token_ids", "positions", "slots", "decode_lengths"):
        fill(getattr(inputs, name), getattr(batch, name))
    fill(inputs.decode_slots[:, :keys], batch.decode_slots)
    for name, table in batch.tables.items():
        fill(inputs.tables[name], table)
