"""`flexllm demo`: serve, finetune under load, and ask what was learnt."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flexllm.cli.options import DEFAULT_MODEL, Model, Threads
from flexllm.config import SLO


def demo(
    model: Model = DEFAULT_MODEL,
    rate: Annotated[
        float | None, typer.Option(help="Chat requests per second, Poisson arrivals (default: what fills half of this machine).", min=0.01)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer of the load.", min=2)] = 40,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.", min=1)] = 3,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the time to the first token, seconds.")] = 1.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for the time per output token, seconds.")] = 0.15,
    time_limit: Annotated[float, typer.Option(help="Give up after so many seconds.")] = 1200.0,
    threads: Threads = None,
) -> None:
    """The whole of FlexLLM in a few minutes: a server under chat load learns about a product that does not exist.

    Starts a server with a state folder of its own, sends it open-loop streaming chat traffic, uploads the training data
    and creates the job with the official openai client, shows what goes on, and in the end asks the base model and the
    finetuned one the same questions. Exit status 1 if a taught fact is missing from the finetuned answers.

    \b
    flexllm demo
    flexllm demo --rate 1 --slo-tpot 0.1
    """
    try:
        from flexllm.cli.demo.run import run_demo
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs the {error.name} package: pip install 'flexllm-engine[dev]'") from None

    with tempfile.TemporaryDirectory(prefix="flexllm-demo-") as state_dir:
        script = run_demo(
            model,
            SLO(slo_ttft, slo_tpot),
            Path(state_dir),
            rate=rate,
            max_tokens=max_tokens,
            epochs=epochs,
            time_limit=time_limit,
            threads=threads,
        )
        try:
            learnt = asyncio.run(script)
        except asyncio.CancelledError:  # SIGTERM
            raise typer.Abort from None
    if not learnt:
        raise typer.Exit(1)
