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

from flexllm.cli.options import DEFAULT_MODEL, Model, model_ref
from flexllm.peft.config import LINEARS, LoraConfig

if TYPE_CHECKING:
    from flexllm.compiler.report import CompileReport
    from flexllm.model.config import ModelConfig

STYLES = {"kept": "yellow", "recomputed": "cyan", "paged": "green", "pruned": "dim"}


def compile(
    model: Model = DEFAULT_MODEL,
    peft: Annotated[str, typer.Option(help="PEFT method; lora.")] = "lora",
    r: Annotated[int, typer.Option("--r", help="LoRA rank.")] = 16,
    target_modules: Annotated[str, typer.Option(help="Linears to adapt, separated by commas.")] = ",".join(LINEARS),
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
    view = Table(title=report.title, caption="One layer; bytes and FLOPs per token, bf16.")
    view.add_column("tensor", no_wrap=True)
    view.add_column("bytes", justify="right")
    view.add_column("decision")
    view.add_column("extra FLOPs", justify="right")
    view.add_column("reason")
    for row in report.rows:
        extra = f"{row.extra_flops:,.0f}" if row.extra_flops else ""
        decision = Text(row.decision, style=STYLES[row.decision])
        view.add_row(row.tensor, f"{row.bytes_per_token:,}", decision, extra, row.reason)
    console = Console(highlight=False)
    console.print(view)
    share = report.extra_flops_per_token / report.backward_flops_per_token
    for line in (
        f"kept in a layer         {report.layer_bytes_per_token:,} bytes per token",
        f"kept in all layers      {report.bytes_per_token:,} bytes per token, {_size(report.total_bytes)} for {report.seq_length} tokens",
        f"K/V pages, there anyway {report.kv_bytes_per_token:,} bytes per token",
        f"recomputation           {report.extra_flops_per_token:,.0f} FLOPs per token, {share:.2%} of the backward",
    ):
        console.print(line)
    console.print("gradients that nobody needs:")
    for dropped in report.dropped_gradients:
        console.print(f"  {dropped}", soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
