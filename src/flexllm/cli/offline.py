"""Loading a model for the verbs that run without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flexllm.cli.options import model_ref

if TYPE_CHECKING:
    from flexllm.llm import LLM


@contextmanager
def loading_progress() -> Iterator[Callable[[str, float], None]]:
    """Yields `report(what, fraction)`, as the engine takes it: a bar on stderr if that is a terminal, else nothing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def load_llm(model: str, *, dtype: str, quantization: str | None, device: str, threads: int | None, max_model_len: int | None) -> LLM:
    """The model that a command line names, with progress shown while it loads and its latency profile is taken."""
    from flexllm.llm import LLM  # brings torch

    with loading_progress() as progress:
        return LLM(
            model_ref(model),
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
            max_model_len=max_model_len,
            progress=progress,
        )
