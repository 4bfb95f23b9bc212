"""Weights in blocks: equal to the gguf package's, a fraction of the bytes, and refused where they cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from flexllm.config import QUANTIZATIONS, EngineConfig
from flexllm.model.config import ModelConfig
from flexllm.model.decoder import Decoder
from flexllm.model.loader import load_weights
from flexllm.ops import QuantizedWeight
from flexllm.ops.cpu import CpuKernels
from flexllm.ops.reference import ReferenceKernels

FORMATS = pytest.mark.parametrize("format", QUANTIZATIONS)
BITS = {"q8_0": 8 + 16 / 32, "q4_0": 4 + 16 / 32, "q4_1": 4 + 2 * 16 / 32}  # of a weight


def random_weight(out: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes: zeros, scales that are subnormal in fp16, and ordinary ones."""
    weight = torch.randn(out, size, generator=torch.Generator().manual_seed(out + size))
    return (weight * torch.logspace(-8, 1, out)[:, None]).index_fill_(0, torch.tensor(out // 2), 0.0).to(dtype)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantizes_as_gguf_does(format: str, dtype: torch.dtype) -> None:
    weight = random_weight(21, 96, dtype)
    kind = GGMLQuantizationType[format.upper()]
    want = torch.from_numpy(dequantize(quantize(weight.float().numpy(), kind), kind))
    quantized = QuantizedWeight.quantize(weight, format)
    assert quantized.shape == weight.shape
    assert quantized.dense().dtype == dtype
    assert torch.equal(quantized.dense(), want.to(dtype))
    assert quantized.nbytes * 8 == weight.numel() * BITS[format]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (21, 96), (300, 576)])  # one block; uneven; every thread's work
@pytest.mark.usefixtures("three_threads")
def test_kernels_dequantize_alike(format: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = QuantizedWeight.quantize(random_weight(*shape, dtype), format)
    dense, bias = weight.dense().double(), torch.randn(shape[0]).to(dtype)
    for kernels in (CpuKernels(), ReferenceKernels()):
        w = kernels.pack_linear(weight)
        assert torch.equal(kernels.dense(w), w.dense())
        for rows in (0, 1, 3, 4, 6, 7, 40):
            x, dy = torch.randn(rows, 2 * shape[1]).to(dtype)[:, : shape[1]], torch.randn(rows, shape[0]).to(dtype)
            assert_product(kernels.linear(x, w), x.double(), dense.t())
            assert_product(kernels.linear(x, w, bias), x.double(), dense.t(), bias.double())
            assert_product(kernels.linear_dx(dy, w), dy.double(), dense)


def assert_product(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """Each number to within the sum of its terms' sizes: for bf16 weights rounded, or not, and then the result (2^-9 each)."""
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}[got.dtype]
    want, sizes = x @ w + bias, x.abs() @ w.abs() + abs(bias)
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= bound * sizes).all()


@FORMATS
def test_only_the_projections_are_quantized(save_tiny: Callable[..., tuple[Any, Path]], format: str) -> None:
    _, folder = save_tiny("qwen2", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    config = ModelConfig.from_hf(folder)
    dense, quantized = (load_weights(folder, config, torch.bfloat16, "cpu", q) for q in (None, format))
    for name in ("embed", "lm_head", "final_norm"):
        assert torch.equal(getattr(quantized, name), getattr(dense, name))
    projections = saved = 0
    for ours, full in zip(quantized.layers, dense.layers, strict=True):
        for name in ("input_norm", "post_norm", "qkv_bias"):
            assert torch.equal(getattr(ours, name), getattr(full, name))
        for name in ("qkv", "o", "gate_up", "down"):
            weight, whole = getattr(ours, name), getattr(full, name)
            assert torch.equal(weight.dense(), QuantizedWeight.quantize(whole, format).dense())
            assert (weight.dense() - whole).abs().max() <= whole.abs().max() / (100 if format == "q8_0" else 6)
            projections += whole.nbytes
            saved += whole.nbytes - weight.nbytes
    assert projections - saved == projections * BITS[format] / 16
    if format == "q4_0":
        assert projections - saved < 0.30 * projections
    assert dense.nbytes - quantized.nbytes == saved
    models = [Decoder(config, w, ReferenceKernels(), 64) for w in (dense, quantized)]
    assert models[0].weight_bytes - models[1].weight_bytes == saved


def test_what_does_not_divide_into_blocks_is_named(save_tiny: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = save_tiny("llama", intermediate_size=80)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.down \[32, 80\] cannot be quantized: q4_0 .* multiple of 32, got 80"):
        load_weights(folder, ModelConfig.from_hf(folder), torch.float32, "cpu", "q4_0")


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization must be one of q8_0, q4_0, q4_1, got 'q5_k'"):
        EngineConfig(quantization="q5_k")
    with pytest.raises(ValueError, match="got 'int8'"):
        QuantizedWeight.quantize(torch.zeros(1, 32), "int8")


def test_without_quantization_gguf_is_not_imported() -> None:
    check = "import sys, flexllm.engine; assert 'gguf' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
