"""Tiny models and tokenizers as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEMPLATE, byte_fallback_tokenizer, byte_level_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_fallback_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-fallback")
    PreTrainedTokenizerFast(tokenizer_object=byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def save_tiny(tmp_path: Path, byte_level_folder: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """save_tiny(family, dtype=..., max_shard_size=..., **config) -> (the model, its folder, complete with a tokenizer)."""

    def save(
        family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **overrides: Any
    ) -> tuple[PreTrainedModel, Path]:
        model = tiny_model(family, **overrides).to(dtype)
        folder = tmp_path / family
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((byte_level_folder / name).read_bytes())
        return model, folder

    return save
