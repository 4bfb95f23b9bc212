"""Settings of every test: one torch thread per worker, the same random numbers every time, and no traces in the user's folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.shapes import LLAMA_8B
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For this process and its children: a state folder of their own, and one thread each, as workers share the machine."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXLLM_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """torch starts from a random one, and a bound that holds for nearly all numbers fails one day."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (tests/tiny.py)."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """config.json of an 8B model, alone in its folder."""
    path = tmp_path / "llama-8b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_8B))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: with several workers the last one to finish is then a short one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
