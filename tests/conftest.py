"""Settings of every test: one torch thread per worker, and no traces in the user's folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # tiny models; several workers share the machine


@pytest.fixture(scope="session", autouse=True)
def _own_state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The database, adapters and latency profiles of the tests, child processes included, live in a folder of their own."""
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("FLEXLLM_STATE_DIR")
    os.environ["FLEXLLM_STATE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FLEXLLM_STATE_DIR"]
    else:
        os.environ["FLEXLLM_STATE_DIR"] = before


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (tests/tiny.py)."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
