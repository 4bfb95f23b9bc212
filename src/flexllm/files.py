"""Durable file writes: what a name shows is either the old content or the new, complete, even after `kill -9` or a power cut.

Everything is written beside its destination, synced, and moved there by rename; a failed write leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError  # it reports a full disk in a class of its own

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(getattr(error, "errno", None), f"cannot write {path}: {reason}") from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
