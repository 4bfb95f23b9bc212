"""What the benchmarks know of the machine without loading torch is what the engine finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from common import DTYPE
from flexllm.model.config import ModelConfig
from flexllm.model.loader import default_dtype


def test_contestants_compute_in_what_the_engine_would_choose(tiny_llama: Path) -> None:
    config = dataclasses.replace(ModelConfig.from_hf(tiny_llama), torch_dtype="bfloat16")
    assert getattr(torch, DTYPE) == default_dtype(config, "cpu")
