"""`flexllm compile`: what the compiler makes of a model and a PEFT method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexllm.cli.options import DEFAULT_MODEL, Model, model_ref
from flexllm.config import LORA_TARGETS, LoraConfig

if TYPE_CHECKING:
    from flexllm.compiler.report import CompileReport
    from flexllm.model.config import ModelConfig


def compile(
    model: Model = DEFAULT_MODEL,
    peft: Annotated[str, typer.Option(help="PEFT method; lora.")] = "lora",
    r: Annotated[int, typer.Option("--r", help="LoRA rank.")] = 16,
    target_modules: Annotated[str, typer.Option(help="Linears to adapt, separated by commas.")] = ",".join(LORA_TARGETS),
    save_level: Annotated[
        str, typer.Option(help="keep: everything the backward reads; recompute: what is not cheap to rebuild.")
    ] = "recompute",
    seq_length: Annotated[int, typer.Option(help="Tokens of a training sequence, for the totals.", min=1)] = 1024,
    config: Annotated[Path | None, typer.Option(help="A config.json instead of MODEL: no weights are needed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what training keeps of each layer: every candidate tensor, kept, recomputed or pruned, bytes per token, and why.

    \b
    flexllm compile default --peft lora
    flexllm compile ./my-model --peft lora --target-modules down_proj --save-level keep
    flexllm compile --config Llama-3.1-8B/config.json --seq-length 8192 --json
    """
    targets = tuple(t.strip() for t in target_modules.split(",") if t.strip())
    lora = LoraConfig(type=peft, r=r, target_modules=targets)
    model_config = _model_config(model, config)

    from flexllm.compiler.report import compile_report

    report = compile_report(model_config, lora, save_level, seq_length)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _print(report)


def _model_config(model: str, config: Path | None) -> ModelConfig:
    from flexllm.model.config import ModelConfig

    if config is not None or (Path(model) / "config.json").is_file():
        return ModelConfig.from_hf(config or model)

    from flexllm.model.loader import resolve_model

    return ModelConfig.from_hf(resolve_model(model_ref(model)))


def _print(report: CompileReport) -> None:
    view = Table(title=report.title)
    view.add_column("tensor")
    view.add_column("bytes/token", justify="right")
    view.add_column("decision")
    view.add_column("reason")
    for row in report.rows:
        view.add_row(row.tensor, f"{row.bytes_per_token:,}", row.decision, row.reason)
    console = Console()
    console.print(view)
