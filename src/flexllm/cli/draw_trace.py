"""Pictures of a trace (matplotlib, the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flexllm.cli.plotting import pyplot

if TYPE_CHECKING:
    from flexllm.cli.trace import Recording

COLOURS = {"decode": "#2f6db5", "prefill": "#7fb2e5", "window": "#f2a541", "backward": "#c8553d"}
QUIET, LATE, GREEN = "#b5b5b5", "#d62728", "#3a8f5c"
BINS = 150  # over the time recorded
SHAPE = (10.0, 4.2)  # inches


def pictures(recording: Recording) -> dict[str, bytes]:
    """PNGs by name."""
    plots: tuple[Callable[[Any, Recording], Any], ...] = (make_up, prediction, slack, throughput)
    plt = pyplot()
    made = {}
    for plot in plots:
        figure = plot(plt, recording)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130)
        plt.close(figure)
        made[plot.__name__] = buffer.getvalue()
    return made


def make_up(plt: Any, recording: Recording) -> Any:
    """What the average iteration of each moment was made of."""
    figure, (forward, backward) = plt.subplots(2, figsize=(SHAPE[0], 5.2), layout="constrained", sharex=True, height_ratios=(2, 1))
    edges = _edges(recording)
    per_iteration = np.maximum(np.histogram(recording.start, edges)[0], 1)
    kinds = ("decode", "prefill", "window")
    forward.stackplot(
        edges,
        [_to_the_end(_binned(recording, kind, edges) / per_iteration) for kind in kinds],
        labels=kinds,
        colors=[COLOURS[kind] for kind in kinds],
        step="post",
        linewidth=0,
    )
    forward.set(ylabel="rows per iteration", ylim=(0, None))
    _head(forward, "What iterations are made of", len(kinds))
    slices = _to_the_end(_binned(recording, "backward", edges) / per_iteration)
    backward.fill_between(edges, slices, color=COLOURS["backward"], step="post", lw=0)
    backward.set(ylabel="backward rows\nx layers", xlabel="seconds", ylim=(0, None), xlim=(0, edges[-1]))
    return figure


def prediction(plt: Any, recording: Recording) -> Any:
    """The latency model against the clock: below the diagonal an iteration was faster than planned."""
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(6.2, 5.8), layout="constrained")
    predicted, actual = (1e3 * np.array(recording.columns[name]) for name in ("predicted", "actual"))
    finetunes = np.array(recording.columns["window"]) + np.array(recording.columns["backward"]) > 0
    serves = np.array(recording.serves)
    shown = (predicted > 0) & (actual > 0)  # of both there is a logarithm
    for members, label, colour in (
        (serves & ~finetunes, "requests only", COLOURS["decode"]),
        (serves & finetunes, "requests and finetuning", GREEN),
        (~serves & finetunes, "finetuning only", COLOURS["window"]),
    ):
        if (members & shown).any():
            axes.scatter(predicted[members & shown], actual[members & shown], s=9, alpha=0.5, linewidths=0, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="actual, ms")
    axes.set_title("Iterations as predicted and as they were", loc="left", fontsize=11)
    low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="#444", lw=1, zorder=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):  # 200, not 2 x 10^2; between powers of ten only 2 and 5, which have room
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False, markerscale=2)
    return figure


def slack(plt: Any, recording: Recording) -> Any:
    """The time each iteration had, and the time it took."""
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=SHAPE, layout="constrained")
    start, serves = np.array(recording.start), np.array(recording.serves)
    had, took = (1e3 * np.array(recording.columns[name]) for name in ("slack", "actual"))
    late = serves & (took > had)
    axes.vlines(start[late], had[late], took[late], color=LATE, lw=0.6, alpha=0.25)  # by how much
    axes.scatter(start[~serves], had[~serves], s=5, color=QUIET, linewidths=0, label="a newcomer's wait (nobody is here)")
    axes.scatter(start[serves], had[serves], s=7, color=GREEN, linewidths=0, label="slack: time to the earliest deadline")
    axes.scatter(start[~late], took[~late], s=5, color=COLOURS["decode"], linewidths=0, label="iteration")
    axes.scatter(start[late], took[late], s=12, color=LATE, linewidths=0, label="iteration longer than its slack")
    values = np.concatenate([had[np.isfinite(had)], took])
    threshold = max(1.0, float(np.quantile(took, 0.1)))
    axes.set_yscale("symlog", linthresh=threshold)  # a slack may be zero
    axes.set(xlabel="seconds", ylabel="ms", xlim=(0, recording.span))
    axes.set_ylim(-0.05 * threshold, float(values.max()) * 1.5)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(alpha=0.25)
    _head(axes, "The promise: iterations end within the slack", 2)
    return figure


def throughput(plt: Any, recording: Recording) -> Any:
    """Tokens to clients and rows of training, per second."""
    figure, axes = plt.subplots(figsize=SHAPE, layout="constrained")
    edges = _edges(recording, BINS // 3)
    for column, label, colour in (
        ("tokens", "output tokens", COLOURS["decode"]),
        ("window", "finetuning rows (forward)", COLOURS["window"]),
    ):
        axes.stairs(_binned(recording, column, edges) / np.diff(edges), edges, color=colour, lw=1.6, label=label)
    if recording.steps:
        axes.plot(
            recording.steps, np.zeros(len(recording.steps)), "^", color=COLOURS["backward"], ms=6, label="optimizer step", clip_on=False
        )
    axes.set(xlabel="seconds", ylabel="per second", xlim=(0, edges[-1]), ylim=(0, None))
    axes.grid(alpha=0.25)
    _head(axes, "Throughput", 3)
    return figure


def _edges(recording: Recording, bins: int = BINS) -> np.ndarray:
    """Of equal spans of time; fewer where iterations are few, so that a bin has some."""
    return np.linspace(0.0, recording.span, max(2, min(bins, len(recording.start) // 4)) + 1)


def _binned(recording: Recording, column: str, edges: np.ndarray) -> np.ndarray:
    """Sum of a column over the iterations that began in each bin."""
    return np.histogram(recording.start, edges, weights=recording.columns[column])[0]


def _to_the_end(values: np.ndarray) -> np.ndarray:
    """As many values as edges: a step drawn `post` needs its last height twice."""
    return np.append(values, values[-1])


def _head(axes: Any, title: str, columns: int) -> None:
    """Title and legend above the axes, clear of the data."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, frameon=False, fontsize=8.5, borderaxespad=0.2, markerscale=2)
