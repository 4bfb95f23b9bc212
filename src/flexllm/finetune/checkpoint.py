"""Durable state of a finetuning job, and the thread that writes it so that the engine never waits for a disk."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexllm.files import atomic_file, write_safetensors

_STATE_FILE = "state.safetensors"


def save_resume(folder: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the folder's state by this one; `meta` is anything JSON holds.

    Tensors and meta share one file (meta in the safetensors header), so that they cannot disagree and a single rename
    replaces both: whenever the process dies, the folder has the previous state or this one. StorageError when the disk refuses.
    """
    with atomic_file(Path(folder) / _STATE_FILE) as part:
        write_safetensors(part, tensors, {"meta": json.dumps(meta)})


def load_resume(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, meta) as last saved, or None if nothing ever was. ValueError when the file is damaged."""
    path = Path(folder) / _STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the state of the job is damaged ({error})") from error


class BackgroundWriter:
    """One thread that runs what is submitted, in order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._errors: deque[Exception] = deque()

    def submit(self, write: Callable[[], None]) -> None:
        """Run `write` after everything submitted before. What it closes over must not change meanwhile. Never blocks."""
        self._executor.submit(self._run, write)

    def drain(self) -> list[Exception]:
        """Wait for every write; returns what those that ended since the last call raised."""
        self._executor.submit(lambda: None).result()
        return [self._errors.popleft() for _ in range(len(self._errors))]

    def close(self) -> list[Exception]:
        """`drain`, then end the thread."""
        errors = self.drain()
        self._executor.shutdown()
        return errors

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # the thread must outlive any of them
            self._errors.append(error)
