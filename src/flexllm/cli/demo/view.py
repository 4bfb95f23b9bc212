"""What the demo shows while it runs: a live panel on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexllm.cli.demo.load import LoadStats, percentile
from flexllm.config import SLO

SPARKS = "▁▂▃▄▅▆▇█"
KINDS = {"decode": "cyan", "prefill": "blue", "window": "yellow", "backward": "magenta"}
PLAIN_INTERVAL = 5.0  # seconds between two plain lines
BAR_WIDTH = 48
PANEL_WIDTH = 76


@dataclass(slots=True)
class DemoState:
    """Everything on the screen. The demo's tasks write it, the view reads it."""

    slo: SLO
    load: LoadStats = field(default_factory=LoadStats)
    phase: str = "starting"
    begin: float = field(default_factory=time.monotonic)
    step: int = 0
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)  # one per optimizer step seen
    tokens_per_second: float = 0.0
    running: int = 0
    waiting: int = 0
    recent: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=40))  # rows of sampled iterations, by kind

    def take(self, stats: Mapping[str, Any], job_id: str | None) -> None:
        """Take in one answer of GET /flexllm/stats."""
        self.running, self.waiting = int(stats["requests"]["running"]), int(stats["requests"]["waiting"])
        step = stats["step"]
        rows = {kind: float(step[kind]) for kind in KINDS}
        rows["backward"] /= step.get("layers", 1)  # counted once per layer; the other rows go through all layers
        self.recent.append(rows)
        for job in stats["jobs"]:
            if job["id"] != job_id:
                continue
            self.total_steps = int(job["total_steps"] or 0)
            self.tokens_per_second = float(job["tokens_per_second"] or self.tokens_per_second)
            if job["step"] > self.step and job["loss"] is not None:
                self.losses.append(float(job["loss"]))
            self.step = max(self.step, int(job["step"]))

    def rows(self) -> dict[str, float]:
        """Mean rows per iteration, by kind, over the iterations sampled lately."""
        return {kind: sum(r[kind] for r in self.recent) / max(1, len(self.recent)) for kind in KINDS}


def sparkline(values: Sequence[float], width: int = BAR_WIDTH) -> str:
    """Values from zero to their largest as block characters; more than `width` are thinned out evenly."""
    if not values:
        return ""
    if len(values) > width:
        values = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
    top = max(values) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int(max(v, 0.0) / top * len(SPARKS)))] for v in values)


def composition(rows: Mapping[str, float], width: int = BAR_WIDTH) -> Text:
    """A bar whose parts are the shares of the kinds of rows."""
    total = sum(rows.values())
    bar = Text()
    for kind, colour in KINDS.items():
        share = rows[kind] / total if total else 0.0
        bar.append("█" * round(share * width), style=colour)
    return bar


def panel(state: DemoState) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", justify="right")
    grid.add_column()
    done = ProgressBar(total=max(1, state.total_steps), completed=state.step, width=BAR_WIDTH)
    grid.add_row("job", done)
    grid.add_row("", f"optimizer step {state.step} of {state.total_steps or '?'}, {state.tokens_per_second:.0f} finetuning tok/s")
    loss = f"  {state.losses[-1]:.4f}" if state.losses else ""
    grid.add_row("loss", Text(sparkline(state.losses) + loss, style="green"))
    grid.add_row("requests", f"{len(state.load.samples)} answered, {state.running} running, {state.waiting} waiting")
    grid.add_row("TTFT", _latency([s.ttft for s in state.load.samples], state.slo.ttft))
    grid.add_row("TPOT", _latency([s.tpot for s in state.load.samples], state.slo.tpot))
    rows = state.rows()
    grid.add_row("iterations", composition(rows))
    legend = Text()
    for kind, colour in KINDS.items():
        legend.append(f"{kind} {rows[kind]:.0f}   ", style=colour)
    grid.add_row("rows", legend)
    return Panel(grid, title=f"FlexLLM demo: {state.phase}", subtitle=f"{time.monotonic() - state.begin:.0f} s", width=PANEL_WIDTH)


def plain(state: DemoState) -> str:
    ttft, tpot = [s.ttft for s in state.load.samples], [s.tpot for s in state.load.samples]
    loss = f"{state.losses[-1]:.4f}" if state.losses else "-"
    rows = " ".join(f"{kind} {n:.0f}" for kind, n in state.rows().items())
    return (
        f"{time.monotonic() - state.begin:5.0f} s  {state.phase}: step {state.step}/{state.total_steps or '?'} loss {loss} "
        f"{state.tokens_per_second:.0f} tok/s | answered {len(ttft)} "
        f"TTFT p50 {_ms(ttft, 0.5)} p99 {_ms(ttft, 0.99)} (SLO {state.slo.ttft * 1e3:.0f}) "
        f"TPOT p50 {_ms(tpot, 0.5)} p99 {_ms(tpot, 0.99)} (SLO {state.slo.tpot * 1e3:.0f}) ms | rows: {rows}"
    )


def _ms(values: Sequence[float], q: float) -> str:
    return f"{percentile(values, q) * 1e3:.0f}" if values else "-"


def _latency(values: Sequence[float], objective: float) -> Text:
    if not values:
        return Text(f"-  (objective {objective * 1e3:.0f} ms)")
    met = percentile(values, 0.99) <= objective
    text = f"p50 {_ms(values, 0.5)} ms   p99 {_ms(values, 0.99)} ms   (objective {objective * 1e3:.0f} ms)"
    return Text(text, style="green" if met else "red")


class View:
    """Shows the state when asked to; safe to ask as often as one likes."""

    def __init__(self, console: Console, live: Live | None, state: DemoState) -> None:
        self._console, self._live, self._state = console, live, state
        self._last, self._phase = float("-inf"), state.phase

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(panel(self._state), refresh=True)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL or self._state.phase != self._phase:
            self._last, self._phase = time.monotonic(), self._state.phase
            self.say(plain(self._state))


@contextmanager
def view_of(state: DemoState, console: Console) -> Iterator[View]:
    if console.is_terminal:
        with Live(panel(state), console=console, auto_refresh=False) as live:
            yield View(console, live, state)
    else:
        yield View(console, None, state)
