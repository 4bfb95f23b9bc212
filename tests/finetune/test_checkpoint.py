"""Durable state: what a killed process leaves is the old state or the new one, never neither and never a mixture."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flexllm.files import StorageError, atomic_folder, write_safetensors
from flexllm.finetune.checkpoint import BackgroundWriter, load_resume, save_resume

KILLED = 9


def state(version: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"a": torch.full((5, 3), float(version)), "b": torch.arange(version + 1)}, {"version": version, "note": "é"}


def loaded_version(folder: Path) -> int | None:
    found = load_resume(folder)
    if found is None:
        return None
    tensors, meta = found
    expected = state(meta["version"])[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    return meta["version"]


def killed_at(operation: int, action: Callable[[], None]) -> bool:
    """Run `action` in a forked child that dies, without any clean-up, before its file operation number `operation`.

    Returns whether it died; False means that it has no operation of that number and ran to its end.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if count == operation:
                    os._exit(KILLED)
                count += 1
                return function(*args, **kwargs)

            return call

        for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), "the action failed in the child"
    return status == KILLED


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The nearest thing to a full disk that needs no mount: writes beyond `size` bytes of a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ----------------------------------------------------------------------------------------------------------------- resume
def test_save_and_load(tmp_path: Path) -> None:
    assert load_resume(tmp_path / "resume") is None
    for version in (1, 2):
        save_resume(tmp_path / "resume", *state(version))
        assert loaded_version(tmp_path / "resume") == version
    assert len(list((tmp_path / "resume").iterdir())) == 1


def test_killed_at_any_point_the_old_or_the_new_state_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "resume"
    save_resume(folder, *state(1))
    operation, seen = 0, []
    while killed_at(operation, lambda: save_resume(folder, *state(2))):
        seen.append(loaded_version(folder))
        save_resume(folder, *state(1))  # what is left over does not disturb the next save
        assert loaded_version(folder) == 1
        operation += 1
    assert loaded_version(folder) == 2
    assert seen == sorted(seen)  # type: ignore[type-var]
    assert set(seen) == {1, 2}


def test_killed_in_the_first_save_there_is_nothing(tmp_path: Path) -> None:
    operation = 0
    while killed_at(operation, lambda: save_resume(tmp_path / f"resume-{operation}", *state(1))):  # noqa: B023
        assert loaded_version(tmp_path / f"resume-{operation}") in (None, 1)
        operation += 1
    assert operation > 3


def test_a_damaged_state_is_a_value_error(tmp_path: Path) -> None:
    save_resume(tmp_path, *state(1))
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_resume(tmp_path)


def test_a_full_disk_is_reported_and_leaves_the_old_state_alone(tmp_path: Path) -> None:
    save_resume(tmp_path, *state(1))
    with file_size_limit(1000), pytest.raises(StorageError, match=r"cannot write .*state\.safetensors"):
        save_resume(tmp_path, {"big": torch.zeros(10_000)}, {})
    assert loaded_version(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------- tensors
def test_tensors_are_read_back_by_the_library(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {f"{t}".removeprefix("torch."): torch.randn(3, 5, generator=random).to(t) for t in (torch.bfloat16, torch.float16)}
    tensors |= {"transposed": torch.randn(40, 7, generator=random).t(), "double": torch.randn(1, dtype=torch.float64, generator=random)}
    tensors |= {"scalar": torch.tensor(7), "nothing": torch.zeros(0, 3), "large": torch.randn(300, 300, generator=random)}
    path = tmp_path / "some.safetensors"
    write_safetensors(path, tensors, {"meta": "é"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"meta": "é"}


def test_other_threads_run_while_tensors_are_written(tmp_path: Path) -> None:
    """A pipe takes no more than another thread of the process reads: who holds the interpreter's lock waits for ever."""
    script = """
import os, sys, threading, torch
from pathlib import Path
from flexllm.files import write_safetensors
pipe = Path(sys.argv[1])
os.mkfifo(pipe)
read = []
reader = threading.Thread(target=lambda: read.append(len(pipe.read_bytes())))
reader.start()
write_safetensors(pipe, {"large": torch.zeros(2**20)}, {})
reader.join()
print(read[0])
"""
    said = subprocess.run([sys.executable, "-c", script, tmp_path / "pipe"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(said) > 4 * 2**20


# ---------------------------------------------------------------------------------------------------------------- folders
def write_folder(path: Path, version: int) -> None:
    with atomic_folder(path) as part:
        for name in ("x", "y"):
            (part / name).write_text(str(version))


def folder_version(path: Path) -> str | None:
    if not path.exists():
        return None
    contents = {p.name: p.read_text() for p in path.iterdir()}
    assert contents.keys() == {"x", "y"}
    assert contents["x"] == contents["y"]
    return contents["x"]


def test_a_folder_killed_at_any_point_is_whole_or_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    write_folder(path, 1)
    operation, seen = 0, []
    while killed_at(operation, lambda: write_folder(path, 2)):
        seen.append(folder_version(path))
        if seen[-1] is None:  # the instant between the two renames: what was there stands beside
            assert folder_version(tmp_path / ".checkpoint-1.old") == "1"
        write_folder(path, 1)
        assert folder_version(path) == "1"
        operation += 1
    assert folder_version(path) == "2"
    assert seen.count(None) == 1
    write_folder(path, 3)
    assert {"checkpoint-1"} == {p.name for p in tmp_path.iterdir() if ".part-" not in p.name}


def test_a_failing_body_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_folder(path, 1)
    with pytest.raises(ValueError, match="invalid literal"), atomic_folder(path) as part:
        (part / "x").write_text(str(int("two")))
    assert folder_version(path) == "1"
    with pytest.raises(StorageError, match="No space left"), atomic_folder(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------------- writer
def test_the_writer_works_in_order_without_blocking_and_reports_errors() -> None:
    writer, done, gate = BackgroundWriter(), [], threading.Event()

    def fail() -> None:
        raise StorageError("disk full")

    writer.submit(lambda: (gate.wait(10), done.append(1))[1])
    writer.submit(fail)
    writer.submit(lambda: done.append(2))
    assert done == []
    gate.set()
    assert [str(e) for e in writer.drain()] == ["disk full"]
    assert done == [1, 2]
    assert writer.drain() == []
    writer.submit(lambda: done.append(3))
    assert writer.close() == []
    assert done == [1, 2, 3]
