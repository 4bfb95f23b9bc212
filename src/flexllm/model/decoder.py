"""The model: embedding, the compiled decoder layers over a fused batch, final norm and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexllm.batch import FusedBatch
from flexllm.compiler.program import ForwardPrograms
from flexllm.memory.kv_cache import KVCache
from flexllm.model.config import ModelConfig, rope_frequencies
from flexllm.model.loader import ModelWeights
from flexllm.ops.reference import LinearWeight, ReferenceKernels
from flexllm.peft.pool import AdapterPool


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

    def save_pooled(self, name: str, value: Tensor) -> None:
        """The same for a value whose columns are pooled over adapters: each store gets its own adapter's."""
        first = self.batch.rank_rows[0]
        for rows in self.batch.windows:
            if rows.state.store.wants(self.layer, name):
                slot = rows.state.slot
                rows.state.store.write(self.layer, name, rows.window.start, value[rows.span, slot.start - first : slot.end - first])


class Decoder:
    def __init__(self, config: ModelConfig, weights: ModelWeights, kernels: ReferenceKernels, max_len: int) -> None:
        self.config, self.kernels = config, kernels
        self.dtype, self.device = weights.embed.dtype, weights.embed.device
        self.embed, self.final_norm = weights.embed, weights.final_norm
        self.head = kernels.pack_linear(weights.lm_head)
        self.layers = [
            Layer(
                w.input_norm, kernels.pack_linear(w.qkv), w.qkv_bias, w.q_norm, w.k_norm, kernels.pack_linear(w.o),
                w.post_norm, kernels.pack_linear(w.gate_up), kernels.pack_linear(w.down),
            )
            for w in weights.layers
        ]  # fmt: skip
        self.attention_scale = config.head_dim**-0.5
        self.programs = ForwardPrograms(config, kernels)
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

    def forward(self, batch: FusedBatch, cache: KVCache, pool: AdapterPool) -> Tensor:
        """Hidden states [N, d] before the final norm; K and V of every row go to the pages, saved values to their stores."""
        x = self.embed[batch.token_ids]
        context = LayerContext(batch, cache, self.kernels, self.attention_scale)
        parameters = pool.range(*batch.rank_rows)
        for index, layer in enumerate(self.layers):
            context.layer = index
            saves = frozenset().union(*(w.state.prepare(index) for w in batch.windows)) if batch.windows else frozenset()
            x = self.programs.get(batch.sites, saves)(x, layer, parameters[index], batch.tables, context)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, d] -> logits [S, V] in fp32 (float64 stays)."""
        h = self.kernels.rms_norm(hidden, self.final_norm, self.config.rms_eps)
        logits = self.kernels.linear(h, self.head)
        return logits if logits.dtype == torch.float64 else logits.float()
