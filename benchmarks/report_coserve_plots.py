"""The report's pictures of co-serving and of the case study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexllm.cli.draw_trace import COLOURS, LATE, QUIET
from grid import SPLITS
from report_plots import BLACK, BLUE, BOUND, GREEN, PINK, SKY, STYLES, Result, figure_of, legend_above, plain_log, png, title

IN_CDFS = ("inference-loose", "coserve-loose", "coserve-strict", "temporal-dynamic", "split", "contending")
TEMPORAL = ("temporal-64", "temporal-128", "temporal-512", "temporal-dynamic")
ZOOM = (-2.0, 5.0)  # seconds around the burst's beginning


def _by_trace(cells: Sequence[Result]) -> dict[str, list[Result]]:
    """Cells of each trace, the lightest load first."""
    traces: dict[str, list[Result]] = {}
    for cell in sorted(cells, key=lambda c: c.get("rate", 0.0)):
        traces.setdefault(cell["trace"], []).append(cell)
    return traces


def _by_load(axes: Any, cells: Sequence[Result], name: str, values: Sequence[float | None], **style: Any) -> None:
    shown = [(x, v) for x, v in enumerate(values) if v is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), lw=1.7, ms=6, **{**STYLES[name], **style})
    axes.set_xticks(range(len(cells)), [f"{c['load']}\n{c['rate']:.2g}/s" if "rate" in c else c["load"] for c in cells])


def attainment(cells: Sequence[Result]) -> bytes:
    """Rows: traces; columns: SLOs."""
    traces = _by_trace(cells)
    slos = [s for s in ("loose", "mid", "strict") if any(f"coserve-{s}" in c["contestants"] for c in cells)]
    figure, axes = figure_of(len(traces), max(1, len(slos)), 3.6, 2.7, sharey=True)
    for row, (trace, found) in zip(axes, traces.items(), strict=True):
        for a, slo in zip(row, slos, strict=False):
            for name in ("contending", *SPLITS, *TEMPORAL, f"coserve-{slo}", f"inference-{slo}"):
                shares = [c["contestants"].get(name, {}).get("attainment", {}).get(slo) for c in found]
                style = {"color": BLUE, "ls": "-", "label": "coserve"} if name.startswith("coserve") else {}
                _by_load(a, found, name, [None if s is None else 100 * s for s in shares], **style)
            title(a, f"{trace}: {slo} SLO")
            a.set_ylim(-3, 104)
        row[0].set_ylabel("requests in time, %")
    legend_above(figure, list(axes.flat), 3)
    return png(figure)


def finetuning(cells: Sequence[Result]) -> bytes:
    """A column per trace."""
    traces = _by_trace(cells)
    figure, axes = figure_of(1, len(traces), max(4.0, 9.0 / len(traces)), 4.4, sharey=True)
    for a, (trace, found) in zip(axes[0], traces.items(), strict=True):
        _by_load(a, found, "bound", [c["bound_tok_s"].get("loose") for c in found])
        for name in ("finetune", "coserve-loose", "coserve-mid", "coserve-strict", *TEMPORAL, *SPLITS, "contending"):
            _by_load(a, found, name, [c["contestants"].get(name, {}).get("finetune_tok_s") for c in found])
        title(a, f"{trace}: finetuning beside requests")
    axes[0][0].set(ylabel="finetuning, tokens/s", ylim=(0, None))  # when all of them have been drawn: it ends the scaling
    legend_above(figure, list(axes.flat), 4)
    return png(figure)


def cdf(result: Result, metric: str) -> bytes:
    """Of "ttft" or "tpot", in ms; rows: traces, columns: loads. Objectives as dotted lines."""
    traces = _by_trace(result["cells"])
    columns = max(len(found) for found in traces.values())
    figure, axes = figure_of(len(traces), columns, max(3.6, 9.0 / columns), 2.9, sharex=True, sharey=True)
    for row, found in zip(axes, traces.values(), strict=True):
        for a, cell in zip(row, found, strict=False):
            for name in IN_CDFS:
                values = 1e3 * np.sort(_latencies(result["samples"], cell, name, metric))
                if len(values):
                    style = {k: v for k, v in STYLES[name].items() if k != "marker"}
                    a.plot(values, 100 * np.arange(1, len(values) + 1) / len(values), lw=1.7, drawstyle="steps-post", **style)
            title(a, f"{cell['trace']}, {cell['load']}")
            a.set_xscale("log")
            for slo, objective in result.get("slos", {}).items():
                x = 1e3 * objective[f"{metric}_s"]
                a.axvline(x, color=QUIET, ls=":", lw=1.2)
                a.text(x, 2, f" {slo}", rotation=90, fontsize=7.5, color="#666", ha="right", va="bottom")
            plain_log(a.xaxis)
        row[0].set_ylabel("requests, %")
    for a in axes[-1]:
        a.set_xlabel(f"{metric.upper()}, ms")
    legend_above(figure, list(axes.flat), 3)
    return png(figure)


def _latencies(samples: Sequence[Result], cell: Result, contestant: str, metric: str) -> list[float]:
    """Seconds, of all rounds; requests that failed have none."""
    found = []
    for s in samples:
        if (s["trace"], s["load"], s["contestant"]) != (cell["trace"], cell["load"], contestant):
            continue
        for r in s["requests"]:
            if r["error"] is not None or r["first"] is None:
                continue
            if metric == "ttft":
                found.append(r["first"] - r["due"])
            elif r["output_tokens"] > 1:
                found.append((r["last"] - r["first"]) / (r["output_tokens"] - 1))
    return found


# -------------------------------------------------------------------------------------------------------------- case study
def burst(result: Result) -> bytes:
    """Requests, output, finetuning and gaps, second by second."""
    columns = {name: np.array(values, dtype=float) for name, values in result["samples"]["by_second"].items()}
    edges = np.append(columns["second"], columns["second"][-1] + 1)
    smooth = max(1, len(columns["second"]) // 120)  # seconds: steps of training are as long as a second
    figure, axes = figure_of(4, 1, 10.0, 1.85, sharex=True)
    requests, output, training, gaps = axes[:, 0]
    low, high = result["load"]["burst"]
    for a in axes.flat:
        a.axvspan(low, high, color=QUIET, alpha=0.25, lw=0)
    requests.stairs(columns["in_flight"], edges, color=BLACK, lw=1.4, label="in flight")
    requests.bar(columns["second"] + 0.5, columns["arrivals"], width=1.0, color=SKY, label="arrivals per second")
    requests.set_ylabel("requests")
    output.stairs(_smoothed(columns["output_tok_s"], smooth), edges, color=COLOURS["decode"], lw=1.4, label="output tokens")
    output.set_ylabel("tokens/s")
    over = "" if smooth == 1 else f", mean of {smooth} s"
    for name, kind in (("forward", "window"), ("backward", "backward")):
        values = _smoothed(columns[f"finetune_{name}_tok_s"], smooth)
        training.stairs(values, edges, color=COLOURS[kind], lw=1.4, label=f"{name}{over}")
    training.axhline(result["finetune_tok_s_usual"], **BOUND, label="usual")
    training.set_ylabel("tokens/s")
    if result.get("comes_back_seconds") is not None:
        back = result["burst_over_at"] + result["comes_back_seconds"]
        training.axvline(back, color=GREEN, lw=1.4, label=f"back {result['comes_back_seconds']:.1f} s after the burst")
    gaps.plot(columns["second"] + 0.5, columns["p99_gap_ms"], ".", color=BLACK, ms=4, label="p99 gap between tokens")
    gaps.axhline(1e3 * result["slo"]["tpot_s"], **BOUND, label="TPOT objective (of the mean)")
    gaps.set(ylabel="ms", xlabel="seconds", xlim=(0, edges[-1]))
    titles = ("Requests", "Their answers", "Training: gives way, comes back", "Waits between tokens")
    for a, text in zip(axes.flat, titles, strict=True):
        a.set_ylim(0, None)
        title(a, text)
        a.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, frameon=False, fontsize=8.5, borderaxespad=0.1)
    return png(figure)


def _smoothed(values: np.ndarray, seconds: int) -> np.ndarray:
    """A centred mean; at the ends over what is there."""
    kernel = np.ones(seconds)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def burst_zoom(result: Result) -> bytes:
    """Each iteration as a bar as wide as it was long: rows by kind, backward, and its time beside its slack."""
    it = {name: np.array(values, dtype=float) for name, values in result["samples"]["iterations"].items()}  # no slack is NaN
    low = result["load"]["burst"][0]
    start = it["start"] - low
    shown = (start + it["actual"] >= ZOOM[0]) & (start <= ZOOM[1])
    it, start = {name: values[shown] for name, values in it.items()}, start[shown]
    figure, axes = figure_of(3, 1, 10.0, 2.3, sharex=True, height_ratios=(1.3, 0.8, 1.3))
    rows, backward, time = axes[:, 0]
    bars: dict[str, Any] = {"width": it["actual"], "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    below = np.zeros(len(start))
    for kind, label in (("decode", "decode"), ("prefill", "prefill"), ("window", "finetuning, forward")):
        rows.bar(start, it[kind], bottom=below, color=COLOURS[kind], label=label, **bars)
        below = below + it[kind]
    rows.set_ylabel("rows")
    title(rows, "The burst arrives at 0: what iterations compute")
    backward.bar(start, it["backward"], color=COLOURS["backward"], label="finetuning, backward", **bars)
    backward.set(ylabel="rows x layers", ylim=(0, 1.05 * it["backward"].max(initial=1.0)))
    serves, took, slack = it["decode"] + it["prefill"] > 0, 1e3 * it["actual"], 1e3 * it["slack"]
    late, trains = serves & (took > slack), it["window"] + it["backward"] > 0
    for members, colour, label in (
        (~serves, QUIET, "training alone"),
        (serves & ~late, BLUE, "within the slack"),
        (late & trains, LATE, "longer, with training"),
        (late & ~trains, PINK, "longer, requests alone"),
    ):
        if members.any():
            width = it["actual"][members]
            time.bar(start[members], took[members], width, align="edge", edgecolor="white", lw=0.5, color=colour, label=label)
    ceiling = 1.6 * took.max(initial=1.0)
    time.hlines(np.minimum(slack, 0.97 * ceiling), start, start + it["actual"], color=BLACK, lw=1.5, label="slack (cut at the top)")
    time.set(ylabel="ms", xlabel="seconds since the burst's first request", xlim=ZOOM, ylim=(0, ceiling))
    title(time, "The time they took, and had")
    for a in axes.flat:
        a.axvline(0, color=BLACK, lw=1, ls=":")
        a.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, frameon=False, fontsize=8.5, borderaxespad=0.1)
    return png(figure)
