"""`flexllm profile`: how long iterations take on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexllm.cli.offline import load_llm
from flexllm.cli.options import DEFAULT_MODEL, Device, Dtype, Model, Quantization, Threads
from flexllm.core import PlanFeatures

if TYPE_CHECKING:
    from flexllm.scheduler.latency import LatencyModel

CONTEXT = 256  # keys each decode row of the table sees
BAR = 30  # characters


def profile(
    model: Model = DEFAULT_MODEL,
    max_rows: Annotated[int, typer.Option(help="Largest batch of the table.", min=1)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table and the coefficients as one JSON object.")] = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Show the latency model that the scheduler plans with: predicted seconds of an iteration by what it is made of.

    The profile is taken at the first start (seconds) and kept in the state folder, per model, device, dtype,
    quantization and threads.

    \b
    flexllm profile
    flexllm profile ./my-model --dtype float32 --json
    """
    with load_llm(model, dtype=dtype, quantization=quantization, device=device, threads=threads, max_model_len=None) as llm:
        latency, layers = llm.latency, llm.model_config.num_layers
    rows = [1 << i for i in range(max_rows.bit_length())]
    table = {n: {kind: latency.predict(features) for kind, features in iterations(n, layers).items()} for n in rows}
    if as_json:
        typer.echo(json.dumps({"seconds": table, "coefficients": latency.coefficients()}))
    else:
        _print(table, latency)


def iterations(n: int, layers: int) -> dict[str, PlanFeatures]:
    """Iterations of n rows of one kind."""
    pairs = n * (n + 1) // 2
    return {
        "decode": PlanFeatures(rows=n, decode_rows=n, decode_context=n * CONTEXT, sampled_rows=n),
        "prefill": PlanFeatures(rows=n, prefill_pairs=pairs, prefills=1, sampled_rows=1),
        "window": PlanFeatures(rows=n, prefill_pairs=pairs, label_rows=n, windows=1),
        "backward": PlanFeatures(backward_rows=n * layers, backward_pairs=pairs * layers, backward_slices=layers),
    }


def _print(table: dict[int, dict[str, float]], latency: LatencyModel) -> None:
    console = Console()
    view = Table(title="Predicted milliseconds of an iteration", caption=f"decode: {CONTEXT} keys per row; backward: all layers")
    for name in ("rows", "decode", "prefill", "window", "backward"):
        view.add_column(name, justify="right")
    view.add_column("decode")
    longest = max(seconds["decode"] for seconds in table.values())
    for n, seconds in table.items():
        bar = "█" * max(1, round(BAR * seconds["decode"] / longest))
        view.add_row(str(n), *(f"{seconds[kind] * 1e3:.1f}" for kind in ("decode", "prefill", "window", "backward")), bar)
    console.print(view)
    for name, value in latency.coefficients().items():
        console.print(f"  {name:16} {value * 1e6:12.3f} µs", highlight=False)
