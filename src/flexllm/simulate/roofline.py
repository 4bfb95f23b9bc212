"""An analytic latency model of a model on a device that need not be at hand: bytes over bandwidth, FLOPs over peak.

Nothing here was measured. EFFICIENCY stands for all that a roofline leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexllm.core import FinetuneJob, SaveLevel
from flexllm.model.config import ModelConfig
from flexllm.scheduler.latency import LINEAR, SEGMENTS, LatencyModel
from flexllm.simulate.replica import Machine

BYTES = 2  # of a weight or an activation: bf16
# What kernels reach of the data sheet. Large dense GEMMs reach 0.6 to 0.8 of the FLOPs and copies 0.85 to 0.9 of the bandwidth; a
# model's iterations, with their norms, ragged attention and gaps between kernels, get less.
COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.5, 0.8
OVERHEAD = 1e-3  # seconds of an iteration besides the device's work: planning, launching, sampling
COLLECTIVE = 1e-5  # seconds of an all-reduce besides its bytes
OPTIMIZER_STEP = 1e-3  # seconds: a few tens of millions of adapter parameters at some 30 bytes each
USABLE_MEMORY = 0.9  # the rest is for temporaries
GROUP_SIZE = 4  # sequences per optimizer step of the job that is planned with
MAX_FINETUNE_SHARE = 0.3  # of what the weights leave: the most that activations take from K/V pages
MIN_KV_TOKENS = 4096  # with room for fewer a model does not fit
MIXES = 4  # save levels from one corner to the next
MAX_BLOCKS = 1 << 18  # more are never full


@dataclass(frozen=True)
class Device:
    """A data sheet: dense bf16 FLOP/s, memory bytes/s, bytes of memory, bytes/s to another device, one way."""

    name: str
    flops: float
    bytes_per_second: float
    memory: float
    link: float


DEVICES = {
    d.name: d
    for d in (
        Device("a100-40gb", 312e12, 1.55e12, 40e9, 300e9),
        Device("a100-80gb", 312e12, 2.0e12, 80e9, 300e9),
        Device("h100-80gb", 989e12, 3.35e12, 80e9, 450e9),
        Device("h200-141gb", 989e12, 4.8e12, 141e9, 450e9),
    )
}


def layer_parameters(model: ModelConfig) -> int:
    """Weights of one layer's linears (P of the FLOP counts)."""
    d = model.hidden_size
    return d * (2 * model.q_size + 2 * model.kv_size) + 3 * d * model.intermediate_size


def kv_bytes_per_token(model: ModelConfig) -> int:
    return 2 * model.num_layers * model.kv_size * BYTES


def roofline(
    device: Device,
    model: ModelConfig,
    tensor_parallel: int = 1,
    compute_efficiency: float = COMPUTE_EFFICIENCY,
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
) -> LatencyModel:
    """Seconds of an iteration of `model` on `tensor_parallel` devices, weights in bf16.

    Per forward pass: the linears' and the head's bytes or the rows' FLOPs, whichever takes longer; on top of it the K/V that
    decode rows read, 4 d FLOPs per query-key pair and layer, the head per sampled row (twice per label). Backward: 2 P FLOPs
    per row and layer (frozen weights need dX alone), 10 d per pair, and the layer's bytes per slice, not overlapped with its
    FLOPs, because the scheduler's model is linear there: some 20 % too slow at 512 rows. Adapters' own FLOPs (1 %) are left out.
    """
    if tensor_parallel < 1 or model.num_kv_heads % tensor_parallel:
        raise ValueError(f"tensor_parallel must divide the {model.num_kv_heads} key/value heads, got {tensor_parallel}")
    per_flop = 1 / (device.flops * compute_efficiency * tensor_parallel)
    per_byte = 1 / (device.bytes_per_second * bandwidth_efficiency * tensor_parallel)
    layers, width = model.num_layers, layer_parameters(model)
    head = model.vocab_size * model.hidden_size
    # Two all-reduces of a row in each layer, forward as backward; a ring sends 2 (n - 1) / n of the bytes.
    exchanged = 4 * (tensor_parallel - 1) / tensor_parallel * model.hidden_size * BYTES / (device.link * bandwidth_efficiency)
    collectives = 2 * layers * COLLECTIVE * (tensor_parallel > 1)

    weights = (layers * width + head) * BYTES * per_byte
    row = layers * 2 * width * per_flop

    def gemms(rows: int) -> float:
        return max(weights, rows * row) + rows * layers * exchanged if rows else 0.0

    knots = [0, *(1 << i for i in range(SEGMENTS))]  # of the latency model's curve
    slopes = [(gemms(b) - gemms(a)) / (b - a) for a, b in pairwise(knots)]
    coefficients = dict.fromkeys(LINEAR, 0.0) | {
        "t0": OVERHEAD + collectives,
        "decode_context": kv_bytes_per_token(model) * per_byte,
        "prefill_pairs": layers * 4 * model.q_size * per_flop,
        "sampled_rows": 2 * head * per_flop,
        "label_rows": 4 * head * per_flop,
        "backward_rows": 2 * width * per_flop + exchanged,
        "backward_pairs": 10 * model.q_size * per_flop,
        "backward_slices": width * BYTES * per_byte + 2 * COLLECTIVE * (tensor_parallel > 1),
        "optimizer_steps": OPTIMIZER_STEP,
    }
    return LatencyModel(coefficients, slopes)


def save_levels(model: ModelConfig, context: int = 512) -> tuple[SaveLevel, ...]:
    """What LoRA keeps per training token beside K/V pages, in bf16, as the compiler finds it (within 3 %, whichever linears have
    adapters: frozen weights need no input, and an adapter's own r columns are few). Named and mixed as in compiler/levels.py.

    recompute: all that the backward reads but what is rebuilt for nothing (x, q, o, x after attention, gate, up); remat 1: gate and
    up are computed again; checkpoint: nothing but x is kept, and rows see `context` keys on average when their attention is repeated.
    Costs are FLOPs over those of the backward's linears, which is what the roofline's backward rows are.
    """
    d, q, mlp = model.hidden_size, model.q_size, 2 * model.hidden_size * model.intermediate_size
    attention = 2 * d * BYTES + 2 * q * BYTES + 4 * model.num_heads  # log-sum-exp in fp32
    again = (2 * d * q + mlp + 2 * q * context) / layer_parameters(model)
    corners = [
        (attention + 2 * model.intermediate_size * BYTES, 1.0),
        (attention, 1 + mlp / layer_parameters(model)),
        (d * BYTES, 1 + again),
    ]
    accumulators = 2 * 4 * model.kv_size + d * BYTES  # dK and dV in fp32 for the layer in progress, and the gradient on its way down
    mixed: list[tuple[str, float, float]] = [("recompute", *corners[0])]
    for n, ((size, cost), (less, more)) in enumerate(pairwise(corners)):
        for part in range(1, MIXES + 1):  # so many of the layers are at the next corner
            share = part / MIXES
            mixed.append((f"remat {n + share:g}", size + share * (less - size), cost + share * (more - cost)))
    mixed[-1] = ("checkpoint", *mixed[-1][1:])
    return tuple(SaveLevel(name, round(model.num_layers * size + accumulators), cost) for name, size, cost in mixed)


def machine_of(device: Device, model: ModelConfig, tensor_parallel: int = 1, finetune_tokens: int = 0, block_size: int = 16) -> Machine:
    """A replica of `model` on `tensor_parallel` devices: its latency, and the memory that the weights leave divided between the
    activations of `finetune_tokens` in flight (no more than a share) and K/V pages. ValueError if the model does not fit."""
    free = USABLE_MEMORY * device.memory * tensor_parallel - model.num_parameters * BYTES
    finetune_bytes = min(finetune_tokens * save_levels(model)[0].bytes_per_token, MAX_FINETUNE_SHARE * max(free, 0.0))
    num_blocks = min(MAX_BLOCKS, int((free - finetune_bytes) / (kv_bytes_per_token(model) * block_size)))
    if num_blocks * block_size < MIN_KV_TOKENS:
        gigabytes = model.num_parameters * BYTES / 1e9
        raise ValueError(f"{gigabytes:.0f} GB of weights leave no room for a K/V cache on {tensor_parallel} x {device.name}")
    return Machine(roofline(device, model, tensor_parallel), num_blocks, block_size, int(finetune_bytes))


def example_job(model: ModelConfig, lengths: Sequence[int]) -> FinetuneJob:
    """A LoRA job that never ends, of sequences of so many tokens, all of them labels."""
    levels = save_levels(model, max(lengths) // 2)
    return FinetuneJob("job", lengths, lengths, GROUP_SIZE, epochs=1 << 30, num_layers=model.num_layers, lowest_layer=0, levels=levels)
