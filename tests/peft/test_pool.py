"""The pool under mixtures whose adapters differ in what they need at a site."""

from __future__ import annotations

import torch

from flexllm.model.config import ModelConfig
from flexllm.peft.config import LoraConfig
from flexllm.peft.pool import AdapterPool, Owner

MODEL = ModelConfig("llama", 100, 32, 48, 2, 4, 2, 8)


def test_a_mixture_over_the_same_rows_that_needs_more_finds_it() -> None:
    """The first batch binds rows [0, 6) without DoRA's vectors; the second spans the same rows, and one of its adapters has DoRA
    at another site than the outer two are at."""
    pool = AdapterPool(MODEL, 16, torch.float32, torch.device("cpu"))
    outer, inner, other = (
        pool.allocate(config)
        for config in (
            LoraConfig(r=2, target_modules=("q_proj",)),
            LoraConfig(r=2, target_modules=("k_proj",), use_dora=True),
            LoraConfig(r=2, target_modules=("q_proj",)),
        )
    )
    pool.bind([Owner(outer, 0, 1, 0), Owner(other, 1, 2, 0)], 2)
    bound = pool.bind([Owner(outer, 0, 1, 0), Owner(inner, 1, 2, 0), Owner(other, 2, 3, 0)], 3)
    neutral = bound.parameters[0]["lora.q_proj.magnitude"]
    assert (neutral == 1).all(), "adapters without DoRA pass through its graph unchanged"
    pool.check_integrity()
