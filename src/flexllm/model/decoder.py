"""The model: embedding, the compiled decoder layers over a fused batch, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexllm.batch import FusedBatch, WindowRows
from flexllm.compiler.levels import JobCompiler
from flexllm.compiler.program import ForwardPrograms
from flexllm.compiler.remat import DeviceCosts
from flexllm.memory.kv_cache import KVCache
from flexllm.model.config import ModelConfig, rope_frequencies
from flexllm.model.layer import site_shapes
from flexllm.model.loader import ModelWeights
from flexllm.ops.reference import LinearWeight, ReferenceKernels, compute_dtype
from flexllm.peft.pool import AdapterPool, AdapterSlot


@dataclass(frozen=True)
class Layer:
    """A layer's weights as its compiled functions bind them (`w.<name>`)."""

    input_norm: Tensor
    qkv: LinearWeight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearWeight
    post_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight
    q_proj_bias: Tensor | None = None  # parts of qkv_bias
    k_proj_bias: Tensor | None = None
    v_proj_bias: Tensor | None = None


class LayerContext:
    """What a layer's forward touches besides its rows: the K/V pages, and the stores of the sequences in the batch."""

    def __init__(self, batch: FusedBatch, cache: KVCache, kernels: ReferenceKernels, scale: float) -> None:
        self.batch, self.cache, self.kernels, self.scale = batch, cache, kernels, scale
        self.layer = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [N, H*hd], k and v [N, K*hd], RoPE applied. Returns o [N, H*hd] and lse [N, H] (window rows only; others undefined)."""
        batch, cache = self.batch, self.cache
        cache.write(self.layer, batch.slots, k, v)
        keys, values = cache.k[self.layer], cache.v[self.layer]
        heads = q.unflatten(-1, (-1, keys.shape[-1]))
        d = batch.num_decode
        parts, lses = [], []
        if d:
            parts.append(self.kernels.decode_attention(heads[:d], keys, values, batch.decode_slots, batch.decode_lengths, self.scale))
        for chunk in batch.chunks:
            k_seen, v_seen = cache.gather(self.layer, chunk.slots)
            o, lse = self.kernels.window_attention(heads[chunk.row : chunk.row + chunk.rows], k_seen, v_seen, self.scale)
            parts.append(o)
            lses.append(lse)
        o = parts[0] if len(parts) == 1 else torch.cat(parts)
        lse = lses[0] if len(lses) == 1 else torch.cat(lses) if lses else o.new_empty(0, heads.shape[1])
        return o.flatten(1), lse

    def save(self, name: str, value: Tensor) -> None:
        """Keep a value's window rows in the stores that want it."""
        offset = self.batch.num_decode if name == "lse" else 0  # decode rows have no lse
        for rows in self.batch.windows:
            if rows.state.store.wants(self.layer, name):
                span = slice(rows.row - offset, rows.row - offset + rows.window.rows)
                rows.state.store.write(self.layer, name, rows.window.start, value[span])

    def save_pooled(self, kind: str, name: str, value: Tensor, pack: Callable[[Tensor], Tensor] | None = None) -> None:
        """The same for a value whose columns are pooled over adapters of a kind: each store gets its own adapter's, packed."""
        first = self.batch.adapters.first_rank[kind]
        for rows in self.batch.windows:
            if rows.state.slot.kind == kind and rows.state.store.wants(self.layer, name):
                slot = rows.state.slot
                own = value[rows.span, slot.start - first : slot.end - first]
                rows.state.store.write(self.layer, name, rows.window.start, pack(own) if pack else own)


class _RowsUnderWay:
    """The rows of a batch on their way through the layers: all but those of windows that come in later, or were suspended."""

    def __init__(self, model: Decoder, batch: FusedBatch, cache: KVCache) -> None:
        self._model, self._whole, self._cache = model, batch, cache
        self._suspended = False
        self._have(self._begun_by(0))
        later = batch.windows[len(self.windows) :]
        self.x = model.embedded(batch.token_ids[: later[0].row] if later else batch.token_ids)

    def take_in(self, layer: int) -> None:
        """Windows that go on from `layer`, with the rows that their states kept."""
        windows = self._begun_by(layer)
        if self._suspended or len(windows) == len(self.windows):
            return
        kept = [w.state.under_way[: w.window.rows] for w in windows[len(self.windows) :] if w.state.under_way is not None]
        self.x = torch.cat([self.x, *kept])
        self._have(windows)

    def suspend_windows(self, layer: int) -> None:
        """Keep their rows in their states; the requests' go on."""
        for rows in self.windows:
            rows.state.suspend(layer, self.x[rows.span])
        self.x = self.x[: self.windows[0].row]
        self._suspended = True
        self._have(())

    def _begun_by(self, layer: int) -> tuple[WindowRows, ...]:
        return tuple(w for w in self._whole.windows if w.window.layer <= layer)

    def _have(self, windows: tuple[WindowRows, ...]) -> None:
        self.windows = windows
        if not (windows or self._has_requests):
            return
        self.batch = self._whole if len(windows) == len(self._whole.windows) else self._whole.with_windows(len(windows))
        self.context = LayerContext(self.batch, self._cache, self._model.kernels, self._model.attention_scale)

    @property
    def _has_requests(self) -> bool:
        return not self._whole.windows or self._whole.windows[0].row > 0


def _parts(qkv_bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, ...]:
    sizes = [site_shapes(config)[name][0] for name in ("q_proj", "k_proj", "v_proj")]
    return () if qkv_bias is None else qkv_bias.split(sizes)


class Decoder:
    def __init__(self, config: ModelConfig, weights: ModelWeights, kernels: ReferenceKernels, max_len: int) -> None:
        self.config, self.kernels = config, kernels
        self.dtype, self.device = weights.embed.dtype, weights.embed.device
        self.embed, self.final_norm = weights.embed, weights.final_norm
        self.head = kernels.pack_linear(weights.lm_head)
        self.layers = [
            Layer(
                w.input_norm, kernels.pack_linear(w.qkv), w.qkv_bias, w.q_norm, w.k_norm, kernels.pack_linear(w.o),
                w.post_norm, kernels.pack_linear(w.gate_up), kernels.pack_linear(w.down), *_parts(w.qkv_bias, config),
            )
            for w in weights.layers
        ]  # fmt: skip
        self.attention_scale = config.head_dim**-0.5
        self.costs = DeviceCosts()  # of this device, once it has been measured (profiler.py)
        self.programs = ForwardPrograms(config, kernels)
        self._squares: dict[tuple[int, str], Tensor] = {}  # squared row norms of base weights, once an adapter has asked for them
        self.backward_compilers: dict[Hashable, JobCompiler] = {}  # by adapter and length, filled by finetune/job.py
        # As Hugging Face: angles in fp32 (here float64 for a float64 model), cos and sin rounded to the model's type.
        angle_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        inverse = torch.tensor(rope_frequencies(config), dtype=angle_dtype)
        angles = torch.outer(torch.arange(max_len, dtype=angle_dtype), inverse).repeat(1, 2)
        self.rope = (angles.cos().to(self.dtype).to(self.device), angles.sin().to(self.dtype).to(self.device))

    @property
    def weight_bytes(self) -> int:
        """Base weights, a tied head counted once (packed copies apart)."""
        linears = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        head = 0 if self.head.weight is self.embed else self.head.weight.nbytes
        return self.embed.nbytes + head + sum(w.weight.nbytes for w in linears)

    def forward(self, batch: FusedBatch, cache: KVCache, interrupted: Callable[[], bool] = lambda: False) -> Tensor:
        """Hidden states [N, d] before the final norm; K and V of every row go to the pages, saved values to their stores.

        Windows that were interrupted before come in at the layer they had reached. Once `interrupted`, all windows are suspended at the
        next layer, their rows kept in their states: what is returned are the rows before them.
        """
        rows = _RowsUnderWay(self, batch, cache)
        for index, layer in enumerate(self.layers):
            rows.take_in(index)
            if rows.windows and interrupted():
                rows.suspend_windows(index)
            if not len(rows.x):
                continue
            rows.context.layer = index
            saves = frozenset().union(*(w.state.prepare(index) for w in rows.windows))
            run = self.programs.get(rows.batch.adapters.bindings, index == 0, saves)
            rows.x = run(rows.x, layer, rows.batch.adapters.parameters[index], {**rows.batch.tables, "layer": index}, rows.context)
        rows.take_in(len(self.layers))
        return rows.x

    def embedded(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> [N, d]. Virtual tokens (-1) get some row: an adapter puts its own in its place, or in that of its keys and
        values, which is all that others see of it."""
        return self.embed[token_ids.clamp_min(0)]

    def refresh_adapter(self, pool: AdapterPool, slot: AdapterSlot) -> None:
        """Bring buffers that derive from an adapter's parameters and the base weights up to date (DoRA's norms)."""
        if not slot.method.needs_refresh(slot.config):
            return
        for index in slot.config.layers(len(self.layers)):
            by_site: dict[str, dict[str, Tensor]] = {}
            for name, tensor in pool.rows(slot, index).items():
                site, parameter = name.split(".")
                by_site.setdefault(site, {})[parameter] = tensor
            for site, parameters in by_site.items():
                base = self.base_weight(index, site)
                if (index, site) not in self._squares:
                    self._squares[index, site] = base.to(compute_dtype(base.dtype)).pow(2).sum(1)
                slot.method.refresh(slot.config, index, site, parameters, base, self._squares[index, site])

    def base_weight(self, layer: int, site: str) -> Tensor:
        """[out, in] of a linear, one of a merged GEMM's too."""
        merged = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        weight = getattr(self.layers[layer], merged.get(site, site.removesuffix("_proj"))).dense()
        if site not in merged:
            return weight
        sizes = {name: site_shapes(self.config)[name][0] for name in merged if merged[name] == merged[site]}
        return dict(zip(sizes, weight.split(list(sizes.values())), strict=True))[site]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, d] -> logits [S, V] in fp32 (float64 stays)."""
        h = self.kernels.rms_norm(hidden, self.final_norm, self.config.rms_eps)
        logits = self.kernels.linear(h, self.head)
        return logits if logits.dtype == torch.float64 else logits.float()
