"""Frozen weights in GGUF's blocks: 32 neighbouring columns of a row share a scale and, where the format has one, an offset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexllm.config import QUANTIZATIONS

BLOCK = 32  # columns


@dataclass(eq=False)
class QuantizedWeight:
    """A weight [out, in] as codes and scales: value = code * scale + offset.

    `dtype` is what it is dequantized to: the rest of the model's. Formats: q8_0 (signed codes), q4_0 (code - 8, no offset), q4_1.
    """

    format: str
    dtype: torch.dtype
    codes: Tensor  # q8_0: int8 [out, in / 32, 32]; else uint8 [out, in / 32, 16]: column i of a block in the low half, i + 16 in the high
    scales: Tensor  # fp16 [out, in / 32]
    offsets: Tensor | None = None  # q4_1: fp16 [out, in / 32]

    @classmethod
    def quantize(cls, weight: Tensor, format: str) -> QuantizedWeight:
        """Quantize weight [out, in] as the gguf package does. ValueError: unknown format, or `in` is not a multiple of 32."""
        if format not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {format!r}")
        if weight.shape[1] % BLOCK:
            raise ValueError(f"{format} needs in-features that are a multiple of {BLOCK}, got {weight.shape[1]}")
        from gguf import GGMLQuantizationType  # here: the engine runs without the package as long as nothing is quantized
        from gguf.quants import quantize

        raw = quantize(weight.detach().float().cpu().numpy(), GGMLQuantizationType[format.upper()])
        blocks = torch.from_numpy(raw).unflatten(1, (weight.shape[1] // BLOCK, -1)).to(weight.device)
        header = 4 if format == "q4_1" else 2  # bytes of a block before its codes
        halves = [blocks[..., i : i + 2].contiguous().view(torch.float16)[..., 0] for i in range(0, header, 2)]
        codes = blocks[..., header:].contiguous()
        return cls(format, weight.dtype, codes.view(torch.int8) if format == "q8_0" else codes, *halves)

    @property
    def shape(self) -> torch.Size:
        out, blocks = self.scales.shape
        return torch.Size((out, blocks * BLOCK))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        return (t for t in (self.codes, self.scales, self.offsets) if t is not None)

    def dense(self) -> Tensor:
        """The weight [out, in] in the model's type: computed in fp32, as gguf does, and rounded once."""
        codes, scales = self.codes, self.scales[..., None].float()
        if self.format != "q8_0":
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        values = codes.float()
        if self.format == "q4_0":
            values -= 8
        values *= scales
        if self.offsets is not None:
            values += self.offsets[..., None].float()
        return values.flatten(1).to(self.dtype)
