"""The report's pictures, as PNGs. Colours are Okabe and Ito's, which the colour-blind can tell apart; contestants also differ in marker."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexllm.cli.draw_trace import QUIET
from flexllm.cli.plotting import pyplot

Result = Mapping[str, Any]

BLUE, SKY, GREEN, ORANGE, RED, PINK, BLACK = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#222222"
STYLES: dict[str, dict[str, Any]] = {
    **{f"inference-{slo}": {"color": BLACK, "marker": "o", "label": "requests alone"} for slo in ("loose", "mid", "strict")},
    "finetune": {"color": QUIET, "marker": "", "ls": ":", "label": "no requests"},
    "bound": {"color": QUIET, "marker": "", "ls": "-", "label": "bound"},
    "coserve-loose": {"color": BLUE, "marker": "s", "label": "coserve, loose SLO"},
    "coserve-mid": {"color": SKY, "marker": "s", "ls": "-.", "label": "coserve, mid SLO"},
    "coserve-strict": {"color": BLUE, "marker": "s", "ls": "--", "label": "coserve, strict SLO"},
    "temporal-128": {"color": ORANGE, "marker": "^", "label": "time slices of 128"},
    "temporal-dynamic": {"color": ORANGE, "marker": "v", "ls": "--", "label": "dynamic time slices"},
    "split": {"color": GREEN, "marker": "D", "label": "split machine (vLLM + PEFT)"},
    "split-25": {"color": GREEN, "marker": "v", "ls": ":", "label": "split machine, 25 % trains"},
    "split-75": {"color": GREEN, "marker": "^", "ls": "--", "label": "split machine, 75 % trains"},
    "contending": {"color": RED, "marker": "X", "label": "contending (vLLM + PEFT)"},
    "coserve": {"color": BLUE, "marker": "s", "label": "coserve"},
    "temporal-64": {"color": PINK, "marker": "<", "ls": ":", "label": "time slices of 64"},
    "temporal-512": {"color": PINK, "marker": ">", "ls": ":", "label": "time slices of 512"},
    "temporal": {"color": ORANGE, "marker": "^", "label": "time slices"},
    "separate-25": {"color": GREEN, "marker": "v", "ls": ":", "label": "separate, 25 % train"},
    "separate-50": {"color": GREEN, "marker": "D", "label": "separate, 50 % train"},
    "separate-75": {"color": GREEN, "marker": "^", "ls": "--", "label": "separate, 75 % train"},
}
BOUND = {"color": QUIET, "ls": "--", "lw": 1.5}


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot().close(figure)
    return buffer.getvalue()


def figure_of(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Any, np.ndarray]:
    """A grid of axes, each `width` x `height` inches; 2-d in any case."""
    figure, axes = pyplot().subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **more)
    for a in axes.flat:
        a.grid(alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def legend_above(figure: Any, axes: Sequence[Any], columns: int = 4) -> None:
    """One legend for all axes: each label once."""
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def plain_log(axis: Any) -> None:
    """200, not 2 x 10^2."""
    from matplotlib import ticker

    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


# --------------------------------------------------------------------------------------------------------- the single parts
def finetune(result: Result) -> bytes:
    figure, axes = figure_of(1, 1, 8.0, 3.8)
    a = axes[0][0]
    by_rows = result["by_rows"]
    for i, (key, label, colour) in enumerate(
        (("tok_s", "this engine", BLUE), ("tok_s_peft", "PEFT", ORANGE), ("tok_s_peft_checkpointing", "PEFT, checkpointing", PINK))
    ):
        bars = a.bar(np.arange(len(by_rows)) + 0.26 * (i - 1), [r[key] for r in by_rows.values()], 0.24, color=colour, label=label)
        a.bar_label(bars, fmt="%.0f", fontsize=9)
    for x, r in enumerate(by_rows.values()):
        a.hlines(r["bound_tok_s"], x - 0.4, x + 0.4, **BOUND, label="bound: GEMMs at their best" if x == 0 else None)
        a.text(x + 0.4, r["bound_tok_s"], f" {r['bound_tok_s']:.0f}", va="center", fontsize=9, color="#666")
    a.set_xticks(range(len(by_rows)), [f"{tokens} tokens" for tokens in by_rows])
    a.set_ylabel("tokens/s")
    title(a, "LoRA steps of one sequence")
    legend_above(figure, [a])
    return png(figure)


def serve(result: Result) -> bytes:
    figure, axes = figure_of(1, 2, 5.2, 3.8)
    speed, tpot = axes[0]
    contestants = (("", "this engine", BLUE, "s"), ("_vllm", "vLLM", GREEN, "D"), ("_hf", "Hugging Face generate", PINK, "v"))
    for suffix, label, colour, marker in contestants:
        style = {"color": colour, "marker": marker, "label": label, "lw": 1.7}
        if found := result.get(f"tok_s{suffix}"):
            speed.plot([int(c) for c in found], list(found.values()), **style)
        if found := result.get(f"tpot_ms{suffix}"):
            tpot.plot([int(c) for c in found], [q["p50"] for q in found.values()], **style)
    if bound := result.get("bound_tok_s"):
        speed.plot([int(c) for c in bound], list(bound.values()), **BOUND, label="bound: GEMMs and memory at their best")
    for a in axes[0]:
        a.set_xscale("log", base=2)
        plain_log(a.xaxis)
        a.set_xlabel("requests at once")
        a.set_ylim(0, None)
    speed.set_ylabel("output tokens/s")
    tpot.set_ylabel("median TPOT, ms")
    title(speed, "Throughput: higher is better")
    title(tpot, "Time per output token: lower is better")
    legend_above(figure, [speed])
    return png(figure)


PASSES = ("conventional", "pruned", "rematerialized", "compressed", "token_level", "floor")


def memory(result: Result) -> bytes:
    """LoRA and a few others, on the largest sequences of each model on paper."""
    shapes = {name: s for name, s in result["shapes"].items() if name.split(", ")[-1] in ("lora", "ia3", "adapter")}
    longest = max(int(name.split(", ")[1]) for name in shapes)
    shapes = {name: s for name, s in shapes.items() if int(name.split(", ")[1]) == longest}
    models = list(dict.fromkeys(name.split(", ")[0] for name in shapes))
    figure, axes = figure_of(1, len(models), 10.0 / len(models), 4.0)
    colours = (QUIET, ORANGE, SKY, GREEN, BLUE, BLACK)
    labels = ("conventional", "graph pruning", "+ rematerialization", "+ compression", "+ token level", "floor: K/V pages only")
    for a, model in zip(axes[0], models, strict=True):
        mine = {name.split(", ")[2]: s for name, s in shapes.items() if name.split(", ")[0] == model}
        for i, (step, label, colour) in enumerate(zip(PASSES, labels, colours, strict=True)):
            values = [s.get(step, np.nan) / 1e9 for s in mine.values()]
            bars = a.bar(np.arange(len(mine)) + 0.14 * (i - 2.5), values, 0.13, color=colour, label=label)
            a.bar_label(bars, fmt="%.3g", fontsize=7.5, rotation=90, padding=2)
        for x, s in enumerate(mine.values()):
            a.hlines(
                s["checkpointing"] / 1e9, x - 0.42, x + 0.42, color=RED, ls="--", lw=1.3, label="gradient checkpointing" if x == 0 else None
            )
        a.set_yscale("log")
        plain_log(a.yaxis)
        a.margins(y=0.15)
        a.set_xticks(range(len(mine)), list(mine))
        title(a, f"{model}, {longest} tokens")
    axes[0][0].set_ylabel("activations, GB (log)")
    legend_above(figure, [axes[0][0]])
    return png(figure)


def latency(result: Result) -> bytes:
    figure, axes = figure_of(1, 2, 5.2, 4.4)
    scatter, errors = axes[0]
    samples = [sample for part, *sample in result["samples"]["part_kind_predicted_measured"] if part == "held_out"]
    kinds = sorted({kind for kind, _, _ in samples})
    for kind, colour, marker in zip(kinds, (BLUE, GREEN, ORANGE, RED, PINK, SKY, BLACK, QUIET) * 4, "os^vDXP*" * 4, strict=False):
        predicted, measured = (np.array([s[i] for s in samples if s[0] == kind]) for i in (1, 2))
        scatter.scatter(1e3 * predicted, 1e3 * measured, s=10, alpha=0.5, color=colour, marker=marker, linewidths=0, label=kind)
        error = np.sort(np.abs(measured / predicted - 1))
        errors.plot(100 * error, 100 * np.arange(1, len(error) + 1) / len(error), color=colour, lw=1.7)
    low, high = (pick(1e3 * s[i] for s in samples for i in (1, 2)) for pick in (min, max))
    scatter.plot([low, high], [low, high], color=BLACK, lw=1, zorder=0)
    scatter.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="measured, ms")
    for axis in (scatter.xaxis, scatter.yaxis):
        plain_log(axis)
    title(scatter, "Iterations as predicted and as they were")
    for q in ("p50", "p95"):
        if noise := result.get(f"noise_{q}"):
            errors.axvline(100 * noise, **BOUND, label=None)
            errors.text(100 * noise, 3, f" machine's noise {q}", rotation=90, fontsize=8, color="#666", ha="right")
    errors.set(xlabel="error, % of the prediction", ylabel="iterations with at most that, %", xlim=(0, 100), ylim=(0, 101))
    title(errors, "Prediction error: left is better")
    legend_above(figure, [scatter], 3)
    return png(figure)


def schedule(result: Result) -> bytes:
    figure, axes = figure_of(1, 1, 8.0, 3.2)
    a = axes[0][0]
    samples = {state: np.array(times) for state, times in result["samples"]["plan_ms_every_20th"].items()}
    end = max(float(np.quantile(times, 0.998)) for times in samples.values())
    for (state, times), colour in zip(samples.items(), (SKY, ORANGE), strict=False):
        a.hist(times, bins=80, range=(0, end), color=colour, alpha=0.7, label=state)
    for name, ls in (("median_ms", "-"), ("p99_ms", "--")):
        a.axvline(result[name], color=BLACK, lw=1.3, ls=ls, label=f"{name.removesuffix('_ms')} {result[name]:.2f} ms")
    a.set(xlabel="ms of schedule()", ylabel="iterations")
    title(a, "Planning an iteration takes a fraction of a millisecond" if result["p99_ms"] < 1 else "Time to plan an iteration")
    a.legend(frameon=False)
    return png(figure)


def simulate(pairs: Sequence[tuple[str, list[tuple[str, float, float]]]]) -> bytes:
    """A row per figure, a mark per workload, in the colour of its trace: simulated over measured."""
    names = list(dict.fromkeys(name for _, figures in pairs for name, _, _ in figures))
    traces = list(dict.fromkeys(label.split(", ")[0] for label, _ in pairs))
    styles = dict(zip(traces, zip((BLUE, ORANGE, GREEN, PINK, RED) * 9, "os^vD" * 9, strict=True), strict=False))
    figure, axes = figure_of(1, 1, 8.0, 1.2 + 0.45 * len(names))
    a = axes[0][0]
    a.axvspan(0.9, 1.1, color=QUIET, alpha=0.25, lw=0)
    a.axvline(1.0, color=BLACK, lw=1)
    for i, (label, figures) in enumerate(pairs):
        trace = label.split(", ")[0]
        colour, marker = styles[trace]
        offset = 0.6 * ((i + 0.5) / len(pairs) - 0.5)
        shown = [(s / m, names.index(name) + offset) for name, s, m in figures if m]
        if shown:
            a.plot(*zip(*shown, strict=True), ls="", ms=6, label=trace, color=colour, marker=marker)
    a.set_yticks(range(len(names)), names)
    a.set_ylim(len(names) - 0.5, -0.5)
    a.set_xlabel("simulated / measured")
    title(a, "How near the simulator comes (band: 10 %)")
    legend_above(figure, [a], 3)
    return png(figure)


def contestants_of(model: Result) -> list[tuple[str, Result]]:
    """Name and figures by rate of each contestant of the paper's experiment."""
    return [(name, model[name]) for name in STYLES if isinstance(model.get(name), Mapping)]


def paper(result: Result) -> bytes:
    """Columns: models; finetuning speed above, attainment below."""
    models = result["models"]
    figure, axes = figure_of(2, len(models), max(3.6, 10.0 / len(models)), 2.9, sharex=True)
    for (speed, share), (name, model) in zip(axes.T, models.items(), strict=True):
        rates = model["rates"]
        for contestant, found in contestants_of(model):
            style = {"lw": 1.7, "ms": 6, **STYLES[contestant]}
            if any(speeds := found.get("finetune_tok_s", [])):  # requests alone train nothing
                speed.plot(rates[: len(speeds)], speeds, **style)
            if shares := found.get("attainment"):
                share.plot(rates[: len(shares)], [100 * s for s in shares], **style)
        dedicated = model.get("dedicated")
        dedicated = dedicated.get("finetune_tok_s") if isinstance(dedicated, Mapping) else dedicated
        if dedicated is not None:
            speed.axhline(float(np.median(dedicated)), **BOUND, label="no requests (bound)")
        theirs = result.get("paper", {}).get(name, {})
        if "rates" in theirs and "finetune_tok_s" in theirs:
            speed.plot(theirs["rates"], theirs["finetune_tok_s"], "x", color=BLACK, ms=9, mew=2, label="coserve in the paper")
        title(speed, name)
        speed.set_ylim(0, None)
        share.set_ylim(-3, 104)
        share.set_xlabel("requests/s")
    axes[0][0].set_ylabel("finetuning, tokens/s")
    axes[1][0].set_ylabel("requests in time, %")
    legend_above(figure, list(axes[0]), 4)
    return png(figure)
