"""A trace of the iterations in Chrome's format, for ui.perfetto.dev, chrome://tracing and `flexllm trace`.

The file is a JSON array, an event per line. It grows by whole iterations, one write each, and needs only its closing bracket
to be valid JSON, which both viewers do without: a killed server leaves a trace that can be looked at.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexllm.core import JobEvent, Request, StepPlan, StepResult

MAX_BYTES = 1 << 27  # some 200,000 iterations; viewers become slow beyond
ITERATIONS, REQUESTS, JOBS = 1, 2, 3  # the tracks ("threads") of the viewers
TRACKS = {ITERATIONS: "iterations", REQUESTS: "requests", JOBS: "finetuning jobs"}

Event = dict[str, Any]

logger = logging.getLogger("flexllm.tracing")
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class IterationTrace:
    """Appends to `path` what each iteration did. Times in the file are microseconds on the engine's clock (Chrome's unit), in
    the events' `args` seconds. What the name held before, say the trace of an engine that died, is kept as `<name>.old`.

    At `max_bytes`, or when the disk refuses, it stops and logs it; nothing here ends an engine that runs. OSError if the file
    cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        if path.is_file():
            path.replace(path.with_name(f"{path.name}.old"))
        self._path, self._left = path, max_bytes
        self._file = path.open("wb", buffering=0)  # a write is whole events, and is in the system's hands when it returns
        names = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": t, "args": {"name": name}} for t, name in TRACKS.items()]
        self._append(b"[\n", [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "FlexLLM engine"}}, *names])

    def iteration(self, plan: StepPlan, result: StepResult, num_running: int, num_waiting: int) -> None:
        """Write an iteration, the requests that ended in it, and its job events. `num_running`, `num_waiting`: requests after it."""
        if self._file.closed:
            return
        events = [] if plan.is_empty else _iteration(plan, result, num_running, num_waiting)
        if any(o.finish_reason is not None for o in result.outputs):
            events += [_finished(c.request, result.end) for c in plan.inference if c.request.finish_reason is not None]
        events += [_job_event(e, result.end) for e in result.events]
        if events:  # an idle engine looks for work many times a second
            self._append(b",\n", events)

    def aborted(self, request: Request, now: float) -> None:
        """Write that a request was ended from outside: by a stop string, or because its client went away."""
        self._append(b",\n", [_finished(request, now)])

    def close(self) -> None:
        """Complete the file. Nothing is written afterwards."""
        if not self._file.closed:
            self._write(b"\n]\n")
            self._file.close()

    def _append(self, before: bytes, events: list[Event]) -> None:
        if self._file.closed:
            return
        text = _encode(events)[1:-1].replace('},{"name":', '},\n{"name":')  # once for all: starting the encoder costs as much as an event
        data = before + text.encode()
        self._left -= len(data)
        if self._left < 0:
            logger.warning("the trace %s is full: nothing more is written to it", self._path)
            self.close()
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            logger.warning("the trace %s ends here: %s", self._path, error.strerror or error)
            self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file that `IterationTrace` wrote, or is writing. ValueError if it is something else."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if file.readline() != "[\n":
            raise ValueError(f"{path} is not a trace of flexllm (serve --trace)")
        for line in file:
            try:
                yield json.loads(line.rstrip(",\n"))
            except ValueError:  # the closing bracket, or the place at which the machine stopped
                return


def _iteration(plan: StepPlan, result: StepResult, num_running: int, num_waiting: int) -> list[Event]:
    decode = sum(c.is_decode for c in plan.inference)
    rows = {"decode": decode, "prefill": plan.inference_rows - decode, "window": plan.window_rows}
    backward, steps = plan.backward_rows, len(plan.optimizer_steps)
    seconds = {"predicted": round(plan.predicted, 6), "actual": round(result.seconds, 6)}
    slack = round(plan.slack, 6) if math.isfinite(plan.slack) else None  # JSON has no infinity
    made_of = [kind for kind, count in (*rows.items(), ("backward", backward), ("step", steps)) if count]
    args = {**rows, "backward": backward, "steps": steps, "tokens": len(result.tokens), **seconds, "slack": slack}
    args |= {"running": num_running, "waiting": num_waiting}
    ts = _microseconds(result.start)
    events = [
        {
            "name": "+".join(made_of) or "release",  # pages and stores are taken back, nothing runs
            "ph": "X",
            "ts": ts,
            "dur": _microseconds(result.seconds),
            "pid": 1,
            "tid": ITERATIONS,
            "args": args,
        },
        _counter("rows", ts, rows),
        _counter("backward rows x layers", ts, {"backward": backward}),  # its own: it would dwarf the others
        _counter("seconds", ts, seconds),
    ]
    if slack is not None:  # a counter has to be a number
        events.append(_counter("slack", ts, {"seconds": slack}))
    return events


def _counter(name: str, ts: float, values: dict[str, Any]) -> Event:
    return {"name": name, "ph": "C", "ts": ts, "pid": 1, "args": values}


def _finished(request: Request, now: float) -> Event:
    """Args: tokens, seconds to the first token and per token after it (None without them), preemptions."""
    ttft = tpot = None
    if request.first_token_time is not None and request.last_token_time is not None:
        ttft = round(request.first_token_time - request.arrival, 6)
        if len(request.output_ids) > 1:
            tpot = round((request.last_token_time - request.first_token_time) / (len(request.output_ids) - 1), 6)
    args = {
        "id": request.id,
        "reason": request.finish_reason,
        "prompt": len(request.prompt_ids),
        "output": len(request.output_ids),
        "ttft": ttft,
        "tpot": tpot,
        "preemptions": request.num_preemptions,
    }
    return {"name": "finished", "ph": "i", "s": "t", "ts": _microseconds(now), "pid": 1, "tid": REQUESTS, "args": args}


def _job_event(event: JobEvent, now: float) -> Event:
    loss = event.loss if event.loss is not None and math.isfinite(event.loss) else None
    name = f"{event.kind} {event.status if event.status is not None else event.step}"
    args = {"job": event.job_id, "kind": event.kind, "step": event.step, "loss": loss, "tokens": event.tokens, "level": event.save_level}
    return {"name": name, "ph": "i", "s": "t", "ts": _microseconds(now), "pid": 1, "tid": JOBS, "args": args}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
