"""Durable file writes: what a name shows is either the old content or the new, complete, even after `kill -9` or a power cut.

Everything is written beside its destination, synced, and moved there by rename; a failed write leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class StorageError(OSError):
    """A file could not be written: disk full, no permission, ... The message says which, and where."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path for the caller to write; on leaving, it becomes `path`. StorageError when the disk refuses."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder for the caller to fill; on leaving, it becomes `path`, in the place of what was there.

    A folder cannot be renamed over another that has files, so for an instant `path` is missing; what it held is then in
    `.<name>.old` beside it, and the next write puts it back if a crash fell into that instant.
    """
    part, old = path.with_name(f".{path.name}.part-{os.getpid()}"), path.with_name(f".{path.name}.old")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(part, ignore_errors=True)  # of a process that had this id and was killed
        try:
            part.mkdir()
            yield part
            for file in part.iterdir():
                _sync(file)
            _sync(part)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.rename(path, old)
            os.rename(part, path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As safetensors.torch.save_file, but other threads of the process go on meanwhile: the library holds the interpreter's lock for
    the whole file, and an engine that serves would stand still for as long (70 of 115 ms of a 55 MB file). Read it with the library."""
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end, parts = 0, []
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # each offset a multiple of its size
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + data.numel()]}
        end += data.numel()
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in parts:
            file.write(data.numpy().data)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
