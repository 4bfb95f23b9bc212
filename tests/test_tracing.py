"""The trace of an engine: valid at every moment, complete, and bounded."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from flexllm.config import FinetuneConfig
from flexllm.core import Request, SamplingParams, StepPlan, StepResult
from flexllm.peft.config import LoraConfig
from flexllm.tracing import IterationTrace, read_events
from tests.oracle.engines import Run, job_spec, open_engine, random_texts
from tests.oracle.harness import VOCAB, random_hf_model


def request(request_id: str) -> Request:
    return Request(request_id, list(range(3, 30)), SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True), 0.0)


@dataclass
class TimedRun(Run):
    """Keeps the seconds of each iteration that had something to do."""

    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        super().step()
        plan, result = self.engine.last_step
        if not plan.is_empty:
            self.seconds.append(result.seconds)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TimedRun]:
    """A few requests, one of them aborted, and a job, to the end."""
    folder = tmp_path_factory.mktemp("trace")
    random_hf_model("llama", folder / "model", torch.float32)
    path = folder / "trace.json"
    engine = open_engine(folder / "model", trace=path, state_dir=folder / "state")
    (folder / "state" / "profiles").mkdir(parents=True)
    texts = random_texts(random.Random(0), (20, 30, 9, 40), VOCAB)
    engine.add_job(job_spec("job", folder, texts, FinetuneConfig(num_epochs=1, batch_size=2), LoraConfig(r=4)))
    run = TimedRun(engine)
    for i in range(4):
        run.add(request(f"r{i}"))
    run.step()
    engine.abort_request("r3")
    run.finish()
    run.step()  # of which the trace says nothing
    assert_readable(path.read_text() + "]", run)  # as a killed server leaves it
    engine.shutdown()
    engine.shutdown()  # which does no harm
    return path, run


def assert_readable(text: str, run: TimedRun) -> list[dict[str, Any]]:
    events = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert sum(e["ph"] == "X" for e in events) == len(run.seconds)
    return events


def test_an_event_per_iteration(recorded: tuple[Path, TimedRun]) -> None:
    path, run = recorded
    events = assert_readable(path.read_text(), run)
    assert events == list(read_events(path))
    iterations = [e for e in events if e["ph"] == "X"]
    assert sum(e["dur"] for e in iterations) / 1e6 == pytest.approx(sum(run.seconds), rel=1e-3)
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(iterations))
    plans = [p for p in run.plans if not p.is_empty]
    for event, plan, seconds in zip(iterations, plans, run.seconds, strict=True):
        args = event["args"]
        assert (args["decode"] + args["prefill"], args["window"], args["backward"]) == (
            plan.inference_rows,
            plan.window_rows,
            plan.backward_rows,
        )
        assert args["steps"] == len(plan.optimizer_steps)
        assert args["actual"] == pytest.approx(seconds, abs=1e-5)
        assert args["predicted"] == pytest.approx(plan.predicted, abs=1e-5)
        named = set(event["name"].split("+"))
        assert named == {k for k in ("decode", "prefill", "window", "backward") if args[k]} | ({"step"} if args["steps"] else set())
    assert iterations[0]["args"]["running"] + iterations[0]["args"]["waiting"] == 4
    assert (iterations[-1]["args"]["running"], iterations[-1]["args"]["waiting"]) == (0, 0)


def test_what_happened_beside_iterations(recorded: tuple[Path, TimedRun]) -> None:
    path, run = recorded
    events = list(read_events(path))
    finished = {e["args"]["id"]: e["args"] for e in events if e["name"] == "finished"}
    assert {i: args["reason"] for i, args in finished.items()} == {"r0": "length", "r1": "length", "r2": "length", "r3": "abort"}
    assert finished["r0"]["output"] == 6
    assert finished["r0"]["ttft"] > 0
    assert finished["r0"]["tpot"] > 0
    told = [e["name"] for e in events if e["ph"] == "i" and e["name"] != "finished"]
    assert told == [f"{e.kind} {e.status or e.step}" for e in run.events]
    assert {"step 1", "step 2", "checkpoint 2", "status succeeded"} <= set(told)
    counters = {e["name"] for e in events if e["ph"] == "C"}
    assert counters == {"rows", "backward rows x layers", "seconds", "slack"}


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_a_file_cut_within_an_event(cut: float, recorded: tuple[Path, TimedRun], tmp_path: Path) -> None:
    text = recorded[0].read_text()
    (tmp_path / "cut.json").write_text(text[: int(cut * len(text))])
    whole, rest = list(read_events(recorded[0])), list(read_events(tmp_path / "cut.json"))
    assert rest == whole[: len(rest)]
    assert abs(len(rest) - cut * len(whole)) < 0.1 * len(whole)


def one_step(request_id: int) -> tuple[StepPlan, StepResult]:
    """An iteration with a piece of a job's memory taken back, and no deadline."""
    return StepPlan(released=(None,), slack=math.inf), StepResult({}, start=float(request_id), end=request_id + 0.5)  # type: ignore[arg-type]


def test_no_deadline_is_null(tmp_path: Path) -> None:
    trace = IterationTrace(tmp_path / "t.json")
    trace.iteration(*one_step(0), 0, 0)
    trace.close()
    (event,) = (e for e in json.loads((tmp_path / "t.json").read_text()) if e["ph"] == "X")
    assert event["args"]["slack"] is None
    assert event["name"] == "release"
    assert event["dur"] == 5e5


def test_the_size_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = IterationTrace(tmp_path / "t.json", max_bytes=5000)
    with caplog.at_level(logging.WARNING):
        for i in range(100):
            trace.iteration(*one_step(i), 0, 0)
        trace.close()
    text = (tmp_path / "t.json").read_text()
    assert 4000 < len(text) <= 5003
    assert len(json.loads(text)) > 10
    assert len([r for r in caplog.records if "is full" in r.message]) == 1


def test_a_full_disk_ends_the_trace_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trace = IterationTrace(Path("/dev/full"))
        for i in range(3):
            trace.iteration(*one_step(i), 0, 0)
        trace.close()
    (record,) = caplog.records
    assert "No space left" in record.message


def test_the_last_trace_is_kept(tmp_path: Path) -> None:
    """An engine that died is started again with the same settings; what it wrote is what one wants to see."""
    path = tmp_path / "t.json"
    IterationTrace(path).iteration(*one_step(0), 0, 0)
    IterationTrace(path).close()
    assert any(e["ph"] == "X" for e in read_events(tmp_path / "t.json.old"))
    assert not any(e["ph"] == "X" for e in read_events(path))
