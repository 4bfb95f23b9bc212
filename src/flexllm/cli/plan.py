"""`flexllm plan`: how many replicas a load and a rate of finetuning need, by simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexllm.config import SLO, SchedulerConfig

if TYPE_CHECKING:
    from flexllm.simulate.capacity import CapacityPlan


def plan(
    trace: Annotated[Path, typer.Option(help="Requests: .csv (arrival_s, prompt_tokens, output_tokens; or Azure's) or .jsonl (Mooncake).")],
    model: Annotated[Path, typer.Option(help="A config.json or a folder with one; no weights are needed.")],
    device: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100-80gb or h200-141gb.")] = "a100-80gb",
    tensor_parallel: Annotated[int, typer.Option(help="Devices per replica.", min=1)] = 1,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the time to the first token, seconds, queueing included.")] = 1.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for the time per output token after it, seconds.")] = 0.1,
    attainment: Annotated[float, typer.Option(help="Share of the requests that must meet both.", min=0.0, max=1.0)] = 0.99,
    finetune_tokens_per_second: Annotated[float, typer.Option(help="Finetuning wanted, all replicas together.", min=0.0)] = 1000.0,
    seq_length: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=1)] = 1024,
    rate: Annotated[
        float | None, typer.Option(help="Stretch the trace to this many requests/s. \\[default: as recorded]", show_default=False)
    ] = None,
    start: Annotated[float, typer.Option(help="Where in the trace to begin, seconds after stretching.", min=0.0)] = 0.0,
    seconds: Annotated[float, typer.Option(help="How much of the trace to run.")] = 300.0,
    max_replicas: Annotated[int, typer.Option(help="Give up beyond so many.", min=1)] = 64,
    max_running: Annotated[int, typer.Option(help="Most requests in the batch of a replica.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Most inference tokens in one iteration.")] = 512,
    noise: Annotated[float, typer.Option(help="Spread (sigma of the log) of iteration times around the model.", min=0.0)] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Find the fewest replicas that serve a trace within its objectives and finetune at a rate, apart and co-serving.

    The scheduler is the real one; the seconds of an iteration come from the device's data sheet, so that a plan
    compares policies better than it predicts a machine.

    \b
    flexllm plan --trace trace.csv --model Llama-3.1-8B/config.json --finetune-tokens-per-second 4000
    flexllm plan --trace trace.csv --model ./my-model --device h100-80gb --slo-ttft 5 --slo-tpot 0.045 --rate 20 --json
    """
    from flexllm.model.config import ModelConfig
    from flexllm.simulate.capacity import plan_capacity
    from flexllm.simulate.roofline import DEVICES, example_job, machine_of
    from flexllm.simulate.workload import load_trace, scaled, window

    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    config = SchedulerConfig(slo=SLO(slo_ttft, slo_tpot), max_running=max_running, max_batch_tokens=max_batch_tokens)
    shape = ModelConfig.from_hf(model)
    arrivals = load_trace(trace)
    arrivals = window(scaled(arrivals, rate) if rate is not None else arrivals, start, seconds)
    if not arrivals:
        raise ValueError(f"{trace}: no request between {start:g} s and {start + seconds:g} s")
    span = min(seconds, max(arrivals[-1].time, 1.0))
    both = machine_of(DEVICES[device], shape, tensor_parallel, config.max_sequences * seq_length)
    alone = machine_of(DEVICES[device], shape, tensor_parallel)
    job = example_job(shape, [seq_length] * 64)
    found = plan_capacity(
        arrivals,
        job,
        finetune_tokens_per_second,
        config,
        both,
        alone,
        attainment=attainment,
        max_replicas=max_replicas,
        seconds=span,
        noise=noise,
        seed=seed,
    )
    if as_json:
        typer.echo(json.dumps(_report(found, config.slo)))
    else:
        title = f"{len(arrivals)} requests in {span:.0f} s, {finetune_tokens_per_second:,.0f} finetuning tokens/s, {device}"
        _print(found, config.slo, title if tensor_parallel == 1 else f"{title} x {tensor_parallel} per replica")


def _report(found: CapacityPlan, slo: SLO) -> dict[str, object]:
    return {
        "separate": {
            "replicas": found.separate,
            "serving": found.serving,
            "finetuning": found.finetuning,
            "finetune_rate_per_replica": found.dedicated_rate,
            **found.inference.summary(slo),
        },
        "coserve": {"replicas": found.coserving, **found.coserve.summary(slo)},
    }


def _print(found: CapacityPlan, slo: SLO, title: str) -> None:
    view = Table(
        title=title, caption=f"Within TTFT {slo.ttft:g} s and TPOT {1e3 * slo.tpot:g} ms, by simulation; device times from its data sheet."
    )
    for heading in ("", "replicas", "in SLO", "TTFT p50 / p99, s", "TPOT p50 / p99, ms", "finetuning tokens/s"):
        view.add_column(heading, justify="left" if not heading else "right")
    rows = (
        (f"separate: {found.serving} serve, {found.finetuning} finetune", found.separate, found.inference),
        ("co-serving", found.coserving, found.coserve),
    )
    for name, replicas, result in rows:
        s = result.summary(slo)
        tuned = found.finetuning * found.dedicated_rate if result is found.inference else result.finetune_rate
        view.add_row(
            name,
            str(replicas),
            f"{s['attainment']:.2%}",
            f"{s['ttft_p50']:.2f} / {s['ttft_p99']:.2f}",
            f"{1e3 * s['tpot_p50']:.1f} / {1e3 * s['tpot_p99']:.1f}",
            f"{tuned:,.0f}",
        )
    console = Console(highlight=False)
    console.print(view)
    console.print("(separate: latencies of those that serve)")
