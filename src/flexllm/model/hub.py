"""Model folders: what one must hold, and how one comes from the Hugging Face hub, online or from its local cache."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import huggingface_hub

_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_folder(folder: Path) -> None:
    """ValueError that says which file is missing unless `folder` holds config.json, safetensors weights and a tokenizer."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a model folder (no config.json)")
    for file in weight_files(folder):
        if not file.is_file():
            raise ValueError(f"{folder}: weights are incomplete ({file.name} is missing)")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer (one of {', '.join(_TOKENIZER_FILES)})")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, else model.safetensors. They need not exist."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "pytorch_model.bin").exists() or (folder / "pytorch_model.bin.index.json").exists():
            raise ValueError(f"{folder}: weights are pickled (pytorch_model.bin); only safetensors are loaded")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error})") from error
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name files of its own folder, got {names}")
    return [folder / name for name in names]


def snapshot(repo_id: str, timeout: float = 3.0) -> Path:
    """Download a model (what is not yet in the hub's local cache); without network take it from that cache.

    Whether the hub can be reached is decided within `timeout` seconds. Raises ValueError with the reason if the model is
    to be had neither way.
    """
    reason = _probe(repo_id, timeout)
    if reason is None:
        try:
            return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=["*/*"]))
        except Exception as error:  # the client raises its HTTP library's errors as well as its own
            reason = _first_line(error)
    if (folder := cached_snapshot(repo_id)) is not None:
        return folder
    raise ValueError(f"model {repo_id!r} is neither a local folder, nor available from the Hugging Face hub, nor in its cache: {reason}")


def cached_snapshot(repo_id: str) -> Path | None:
    """The model's folder in the hub's local cache, if it is there and complete."""
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True))
        check_folder(folder)
    except (OSError, ValueError):  # not there; half downloaded; not a repository id
        return None
    return folder


def _probe(repo_id: str, timeout: float) -> str | None:
    """Why the hub cannot deliver `repo_id`, or None if it can. A thread, because name resolution obeys no timeout."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(repo_id, timeout=timeout)
            outcome.append(None)
        except Exception as error:  # as above
            outcome.append(_first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else f"no answer within {timeout:g} s"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
