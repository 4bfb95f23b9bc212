"""`flexllm trace`: what a recorded engine did with its time, and whether it kept its promise."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flexllm.tracing import Event, read_events

COLUMNS = ("decode", "prefill", "window", "backward", "steps", "tokens", "predicted", "actual", "slack", "running", "waiting")


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `flexllm serve --trace FILE`; it may still be growing.")],
    to_html: Annotated[
        Path | None, typer.Option("--html", metavar="REPORT.html", help="Write the tables and pictures as one file.", show_default=False)
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the pictures into this folder.", show_default=False)] = None,
) -> None:
    """Show what a recorded engine did: time by kind of iteration, prediction errors, slack, finetuning speed.

    ui.perfetto.dev and chrome://tracing open the same FILE.

    \b
    flexllm serve --trace trace.json
    flexllm trace trace.json
    flexllm trace trace.json --html report.html --png pictures
    """
    recording = Recording.load(file)
    kinds, figures = by_kind(recording), whole(recording)
    _print(file.name, kinds, figures)
    if to_html is None and png is None:
        return

    from flexllm.cli import draw_trace

    pictures = draw_trace.pictures(recording)
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (png / f"{name}.png").write_bytes(data)
    if to_html is not None:
        to_html.write_text(_html(file.name, kinds, figures, pictures), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- what is read
@dataclass(slots=True)
class Recording:
    """A trace as columns, an entry per iteration. Seconds; `start` counts from the first iteration."""

    kind: list[str] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})  # no slack is NaN
    finished: list[dict[str, Any]] = field(default_factory=list)  # the args of requests that ended (tracing.py)
    steps: list[float] = field(default_factory=list)  # when optimizer steps were done

    @classmethod
    def load(cls, path: Path) -> Recording:
        """ValueError if the file is no trace, or has no iteration."""
        recording = cls()
        try:
            for event in read_events(path):
                recording._take(event)
        except (KeyError, TypeError):
            raise ValueError(f"{path} is a trace of something else") from None
        if not recording.start:
            raise ValueError(f"{path} has no iterations: the engine was not asked for anything")
        begin = recording.start[0]
        recording.start = [t - begin for t in recording.start]
        recording.steps = [t - begin for t in recording.steps]
        return recording

    def _take(self, event: Event) -> None:
        if event["ph"] == "X":
            self.kind.append(event["name"])
            self.start.append(event["ts"] / 1e6)
            for name, values in self.columns.items():
                value = event["args"][name]
                values.append(float("nan") if value is None else value)
        elif event["ph"] == "i" and event["name"] == "finished":
            self.finished.append(event["args"])
        elif event["ph"] == "i" and event["args"]["kind"] == "step":
            self.steps.append(event["ts"] / 1e6)

    @property
    def span(self) -> float:
        """Seconds from the beginning of the first iteration to the end of the last."""
        return max(self.start[-1] + self.columns["actual"][-1], 1e-9)

    @property
    def serves(self) -> list[bool]:
        """Iterations with rows of requests: in the others the slack is no deadline, only what a newcomer may have to wait."""
        return [d + p > 0 for d, p in zip(self.columns["decode"], self.columns["prefill"], strict=True)]


# ------------------------------------------------------------------------------------------------------------- what is said
def by_kind(recording: Recording) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row per kind of iteration, the one that took the most time first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, kind in enumerate(recording.kind):
        groups[kind].append(i)
    actual, predicted = recording.columns["actual"], recording.columns["predicted"]
    total = sum(actual) or 1e-9
    rows = []
    for kind, members in sorted(groups.items(), key=lambda item: -sum(actual[i] for i in item[1])):
        seconds = [actual[i] for i in members]
        errors = _errors([predicted[i] for i in members], seconds)
        share = f"{sum(seconds) / total:.1%}"
        rows.append([kind, f"{len(members):,}", f"{sum(seconds):.2f}", share, f"{1e3 * _quantile(seconds, 0.5):.1f}", *errors])
    rows.append(
        ["all", f"{len(actual):,}", f"{sum(actual):.2f}", "100.0%", f"{1e3 * _quantile(actual, 0.5):.1f}", *_errors(predicted, actual)]
    )
    return ["iteration", "count", "s", "share", "p50 ms", "error p50", "error p95"], rows


def whole(recording: Recording) -> list[tuple[str, str]]:
    """Figures of the whole recording, by name."""
    c, span = recording.columns, recording.span
    promised = [i for i, serves in enumerate(recording.serves) if serves and c["slack"][i] == c["slack"][i]]
    slack = [c["slack"][i] for i in promised]
    late = sum(c["actual"][i] > c["slack"][i] for i in promised)
    figures = [
        ("recorded", f"{span:.1f} s, {len(recording.start):,} iterations"),
        ("idle between iterations", f"{max(0.0, 1 - sum(c['actual']) / span):.1%}"),
        ("output tokens", f"{sum(c['tokens']) / span:.1f} per second"),
        ("finetuning rows forward", f"{sum(c['window']) / span:.1f} per second"),
        ("finetuning rows x layers backward", f"{sum(c['backward']) / span:,.0f} per second"),
        ("optimizer steps", f"{len(recording.steps)}"),
    ]
    if promised:
        figures += [
            ("slack with requests p50, p01", f"{1e3 * _quantile(slack, 0.5):.1f} ms, {1e3 * _quantile(slack, 0.01):.1f} ms"),
            ("iterations longer than their slack", f"{late:,} of {len(promised):,} ({late / len(promised):.1%})"),
        ]
    for name, title in (("ttft", "time to first token p50, p99"), ("tpot", "time per output token p50, p99")):
        if seconds := [r[name] for r in recording.finished if r[name] is not None]:
            figures.append((title, f"{1e3 * _quantile(seconds, 0.5):.1f} ms, {1e3 * _quantile(seconds, 0.99):.1f} ms"))
    return [*figures, ("requests that ended", f"{len(recording.finished):,}")]


def _errors(predicted: list[float], actual: list[float]) -> list[str]:
    """Median and 95th percentile of actual / predicted - 1, as the scheduler counts it for its margin."""
    errors = [a / p - 1 for p, a in zip(predicted, actual, strict=True) if p > 0]
    return [f"{_quantile(errors, q):+.0%}" if errors else "" for q in (0.5, 0.95)]


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _print(name: str, kinds: tuple[list[str], list[list[str]]], figures: list[tuple[str, str]]) -> None:
    console = Console(highlight=False)
    headings, rows = kinds
    view = Table(title=f"Iterations of {name}", caption="share: of the time; error: actual / predicted - 1")
    for heading in headings:
        if heading == "iteration":
            view.add_column(heading, overflow="fold")  # in a narrow terminal it is the names that give way
        else:
            view.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        view.add_row(*row, end_section=row is rows[-2])
    console.print(view)
    overall = Table(show_header=False)
    for figure in figures:
        overall.add_row(*figure)
    console.print(overall)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; font-weight: normal }
th { color: #666 } td:first-child, th:first-child { text-align: left } tr.all td { border-top: 2px solid #999 }
img { width: 100% } p { color: #666 }
"""


def _html(name: str, kinds: tuple[list[str], list[list[str]]], figures: list[tuple[str, str]], pictures: dict[str, bytes]) -> str:
    """The report as one file that refers to nothing outside of it."""
    headings, rows = kinds

    def line(cells: tuple[str, ...] | list[str], tag: str = "td") -> str:
        style = ' class="all"' if cells[0] == "all" else ""
        return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    title = html.escape(f"Iterations of {name}")
    images = []
    for picture, data in pictures.items():
        images.append(f'<img alt="{picture}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>',
        f"<h1>{title}</h1>",
        *("<table>", *map(line, figures), "</table>"),
        *("<table>", line(headings, "th"), *map(line, rows), "</table>"),
        "<p>share: of the time; error: actual / predicted - 1</p>",
        *images,
        "</body></html>\n",
    ]
    return "\n".join(parts)
