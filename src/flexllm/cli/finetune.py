"""`flexllm finetune`: train an adapter offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexllm.cli.offline import load_llm
from flexllm.cli.options import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    MaxModelLen,
    Model,
    PeftSettings,
    PeftType,
    Quantization,
    Rank,
    TargetModules,
    Threads,
    peft_from_options,
)
from flexllm.config import FinetuneConfig
from flexllm.core import JobEvent


def finetune(
    data: Annotated[Path, typer.Option("--data", help="Training examples, JSONL.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.")],
    model: Model = DEFAULT_MODEL,
    valid: Annotated[Path | None, typer.Option(help="Validation examples, JSONL.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    lr_schedule: Annotated[str, typer.Option(help="constant, linear or cosine, after warmup.")] = "linear",
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = 0.03,
    num_epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 4,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    max_seq_length: Annotated[int, typer.Option(help="Longer examples are left out, and counted (see --truncate).")] = 1024,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut longer examples instead.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient to this norm; 0 does not clip.")] = 1.0,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations. \\[default: one epoch]", show_default=False)] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. \\[default: one epoch]", show_default=False)
    ] = None,
    peft: PeftType = "lora",
    r: Rank = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA scale is lora_alpha / r. \\[default: 32]", show_default=False)] = None,
    target_modules: TargetModules = None,
    settings: PeftSettings = None,
    init_adapter: Annotated[Path | None, typer.Option(help="Continue this adapter (PEFT folder; same rank and targets).")] = None,
    save_level: Annotated[
        str, typer.Option(help="What training keeps: auto, keep, recompute, checkpoint, segments or kv; see `flexllm compile`.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order and of the initial weights.")] = 0,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Take the examples in the order of the file.")] = False,
    log_json: Annotated[Path | None, typer.Option(help="Write a JSON line per optimizer step to this file.")] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Train an adapter of MODEL and write it to a folder in PEFT's format.

    A line of the data is {"messages": [{"role", "content"}, ...]} (loss on the assistant's turns), {"prompt", "completion"}
    or {"text"}. A line of --log-json has step, loss, tokens, labels, grad_norm, learning_rate
    and save_level.

    \b
    flexllm finetune default --data train.jsonl -o ./adapter --valid valid.jsonl
    flexllm finetune ./my-model --data train.jsonl -o ./adapter --r 8 --lora-alpha 16 --target-modules q_proj,v_proj
    flexllm finetune default --data train.jsonl -o ./adapter --peft lora --set use_dora=true
    flexllm finetune default --data train.jsonl -o ./adapter --peft prefix_tuning --set num_virtual_tokens=32
    flexllm finetune default --data more.jsonl -o ./adapter2 --init-adapter ./adapter --max-steps 100
    """
    peft_settings = peft_from_options(peft, target_modules, settings, r=r, lora_alpha=lora_alpha)
    config = FinetuneConfig(
        learning_rate=learning_rate,
        lr_schedule=lr_schedule,
        warmup_ratio=warmup_ratio,
        num_epochs=num_epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_seq_length=max_seq_length,
        truncate=truncate,
        max_steps=max_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        save_level=save_level,
        seed=seed,
        shuffle=not no_shuffle,
    )
    for path in (data, valid):
        if path is not None and not path.is_file():
            raise ValueError(f"no such file: {path}")

    with (
        load_llm(model, dtype=dtype, quantization=quantization, device=device, threads=threads, max_model_len=max_model_len) as llm,
        _reporter(log_json) as report,
    ):
        adapter = llm.finetune(data, peft_settings, config, output_dir=output, valid=valid, init_adapter=init_adapter, callback=report)
    losses = adapter.losses
    typer.echo(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}; adapter in {adapter.path}")


@contextmanager
def _reporter(log_json: Path | None) -> Iterator[Callable[[JobEvent], None]]:
    """Yields what is to be called with each event: it moves the bar and writes the log."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    log = log_json.open("w", encoding="utf-8") if log_json else None
    begin = monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("finetuning", total=None, numbers="")

        def report(event: JobEvent) -> None:
            if event.kind == "step":
                speed = event.tokens / (monotonic() - begin)
                bar.update(task, total=event.total_steps, completed=event.step, numbers=f"loss {event.loss:.4f}  {speed:.0f} tok/s")
                if log:
                    log.write(json.dumps({name: getattr(event, name) for name in LOG_FIELDS}) + "\n")
                    log.flush()
            elif event.kind == "validation":
                console.print(f"step {event.step}: validation loss {event.loss:.4f}, token accuracy {event.token_accuracy:.3f}")

        try:
            yield report
        finally:
            if log:
                log.close()


LOG_FIELDS = ("step", "loss", "tokens", "labels", "grad_norm", "learning_rate", "save_level")
