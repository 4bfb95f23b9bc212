"""What the last steps of a job came to, beside the adapter in each checkpoint's folder: under the name and in the layout that Hugging
Face's trainer has for it. No torch here: the server reads it too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from flexllm.core import JobEvent

LOG_FILE = "trainer_state.json"


def log_text(steps: Iterable[JobEvent]) -> str:
    history = [asdict(event) for event in steps]
    last = history[-1]
    numbers = {"global_step": last["step"], "max_steps": last["total_steps"], "epoch": last["epoch"]}
    return json.dumps(numbers | {"log_history": history}, indent=1)


def read_log(checkpoint: Path) -> list[JobEvent]:
    """The steps up to a checkpoint; none where there is no log, or one that others wrote."""
    try:
        return [JobEvent(**step) for step in json.loads((checkpoint / LOG_FILE).read_text(encoding="utf-8"))["log_history"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
