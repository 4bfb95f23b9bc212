"""What the machine can do at best, measured in the run that quotes it: GEMM FLOP/s and copy bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flexllm.model.config import ModelConfig

SAMPLES = 7


@dataclass(frozen=True, slots=True)
class MachineBounds:
    gemm_flops: float  # FLOP/s of the fastest of `gemms`
    copy_bytes: float  # bytes/s, read plus written
    gemms: dict[str, float]  # FLOP/s by shape "MxKxN"

    def as_dict(self) -> dict[str, Any]:
        return {
            "gemm_gflops": self.gemm_flops / 1e9,
            "copy_gb_s": self.copy_bytes / 1e9,
            "gemm_gflops_by_shape": {shape: flops / 1e9 for shape, flops in self.gemms.items()},
        }


def measure_bounds(config: ModelConfig, rows: int, dtype: torch.dtype) -> MachineBounds:
    """Bounds at the shapes of the model's own GEMMs with `rows` rows, and of one large square GEMM."""
    d, f = config.hidden_size, config.intermediate_size
    shapes = [(rows, d, 2 * f), (rows, f, d), (rows, 2 * f, d), (1024, 1024, 1024), (2048, 2048, 2048)]
    gemms = {f"{m}x{k}x{n}": _gemm_flops(m, k, n, dtype) for m, k, n in shapes}
    source = torch.ones(32 * 2**20, dtype=torch.float32)  # 128 MiB: beyond any cache
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source))
    return MachineBounds(max(gemms.values()), 2 * source.nbytes / seconds, gemms)


def _gemm_flops(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """The better of a plain and (on CPU) a prepacked oneDNN GEMM."""
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    times = [best_seconds(lambda: torch.nn.functional.linear(x, w))]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(w)
        times.append(best_seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")))
    return 2 * m * k * n / min(times)


def best_seconds(run: Callable[[], object]) -> float:
    """The fastest of a few runs: a bound is what the machine can reach, not what it reaches on average."""
    run()
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """FLOPs of one LoRA training sequence, forward and backward, nothing recomputed (algorithms.md 2.5).

    Frozen weights need dX only. The head takes two GEMM passes: logits, and the gradient of its input.
    """

    linears: float
    attention: float
    head: float
    lora: float

    @property
    def total(self) -> float:
        return self.linears + self.attention + self.head + self.lora


def training_flops(config: ModelConfig, rows: int, rank: int) -> TrainingFlops:
    """For a sequence of `rows` rows, LoRA of `rank` on all seven targets."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = d * (q + 2 * kv) + q * d + 3 * d * f
    sides = (d + q) + 2 * (d + kv) + (q + d) + 3 * (d + f)  # in + out over the targets
    pairs = rows * (rows + 1) / 2
    return TrainingFlops(
        linears=4.0 * rows * weights * layers,
        attention=(4 + 10) * q * pairs * layers,
        head=4.0 * rows * d * config.vocab_size,
        lora=6.0 * rows * rank * sides * layers,
    )
