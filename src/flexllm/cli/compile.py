"""`flexllm compile`: what the compiler makes of a model and a PEFT method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexllm.cli.options import DEFAULT_MODEL, Model, PeftSettings, PeftType, Rank, TargetModules, model_ref, peft_from_options

if TYPE_CHECKING:
    from flexllm.compiler.report import CompileReport
    from flexllm.model.config import ModelConfig

STYLES = {"kept": "yellow", "compressed": "magenta", "recomputed": "cyan", "paged": "green", "pruned": "dim"}


def compile(
    model: Model = DEFAULT_MODEL,
    peft: PeftType = "lora",
    target_modules: TargetModules = None,
    r: Rank = None,
    settings: PeftSettings = None,
    save_level: Annotated[
        str, typer.Option(help="auto: all levels; or one of those: keep, recompute, checkpoint, segments, kv, ...")
    ] = "auto",
    seq_length: Annotated[int, typer.Option(help="Tokens of a training sequence, for the totals.", min=1)] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences held at once, for the totals.", min=1)] = 1,
    config: Annotated[Path | None, typer.Option(help="A config.json instead of MODEL: no weights are needed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write memory against time of all levels as a picture (.png, .svg).")] = None,
    graph: Annotated[Path | None, typer.Option(help="Write the layer's graph, coloured by decision, as a picture (.svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what training keeps of each layer: every candidate tensor, kept, recomputed or pruned, bytes per token, and why.

    \b
    flexllm compile default --peft lora
    flexllm compile ./my-model --peft lora --target-modules down_proj --save-level checkpoint
    flexllm compile --config Llama-3.1-8B/config.json --peft prefix_tuning --set num_virtual_tokens=32 --seq-length 8192 --json
    flexllm compile default --plot levels.png --graph layer.svg
    """
    adapter = peft_from_options(peft, target_modules, settings, r=r)
    model_config = _model_config(model, config)

    from flexllm.compiler.report import compile_report

    report = compile_report(model_config, adapter, save_level, seq_length, batch)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _print(report)
    if plot is not None or graph is not None:
        from flexllm.cli import draw

        if plot is not None:
            draw.levels(compile_report(model_config, adapter, "auto", seq_length, batch), plot)
        if graph is not None:
            draw.layer(model_config, adapter, save_level, seq_length, graph)


def _model_config(model: str, config: Path | None) -> ModelConfig:
    from flexllm.model.config import ModelConfig

    if config is not None or (Path(model) / "config.json").is_file():
        return ModelConfig.from_hf(config or model)

    from flexllm.model.loader import resolve_model

    return ModelConfig.from_hf(resolve_model(model_ref(model)))


def _print(report: CompileReport) -> None:
    console = Console(highlight=False)
    view = Table(title=report.title, caption=f"One layer at level {report.level}; bytes and FLOPs per token, bf16.")
    view.add_column("tensor", no_wrap=True)
    view.add_column("bytes", justify="right")
    view.add_column("decision")
    view.add_column("extra FLOPs", justify="right")
    view.add_column("reason")
    for row in report.rows:
        extra = f"{row.extra_flops:,.0f}" if row.extra_flops else ""
        decision = Text(row.decision, style=STYLES[row.decision])
        view.add_row(row.tensor, f"{row.bytes_per_token:,}", decision, extra, row.reason)
    console.print(view)
    tokens = f"{report.batch} x {report.seq_length} tokens" if report.batch > 1 else f"{report.seq_length} tokens"
    levels = Table(title="Levels", caption="All layers. Saved: between forward and backward. Gradients: on their way down, with dK/dV.")
    for heading in ("level", "saved B/token", "gradients B/token", tokens, "extra FLOPs", "backward time"):
        levels.add_column(heading, justify="left" if heading == "level" else "right", no_wrap=heading == "level")
    for level in report.levels:
        levels.add_row(
            level.level,
            f"{level.saved_bytes:,}",
            f"{level.gradient_bytes:,}",
            _size(level.total_bytes),
            f"{level.extra_flops_share:+.1%}",
            f"x {level.relative_time:.2f}",
        )
    console.print(levels)
    console.print(f"K/V pages, there anyway: {report.kv_bytes_per_token:,} bytes per token")
    console.print("gradients that nobody needs:")
    for dropped in report.dropped_gradients:
        console.print(f"  {dropped}", soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
