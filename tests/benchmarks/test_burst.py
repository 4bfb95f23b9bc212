"""What the case study reads from a trace: giving way, coming back, and the seconds of the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from burst import (
    Iteration,
    arrivals_seen,
    burst_load,
    by_second,
    comes_back,
    figures,
    finetune_rate,
    gives_way,
    iterations_until,
    read_trace,
    spread,
)
from client import RequestRecord
from flexllm.core import FinetuneJob, InferenceChunk, Request, SamplingParams, Sequence, StepPlan, StepResult, TokenWindow
from flexllm.tracing import IterationTrace

LAYERS = 10


def training(start: float, rows: int = 50) -> Iteration:
    """Half a second of training alone: `rows` forward and as many backward, twice that per second."""
    return Iteration(start, 0.5, 0.5, 1.0, decode=0, prefill=0, window=rows, backward=rows * LAYERS, running=0, waiting=0)


def serving(start: float, prefill: int = 0, window: int = 0, predicted: float = 0.5, running: int = 1, finished: int = 0) -> Iteration:
    return Iteration(start, 0.5, predicted, 0.6, 1, prefill, window, 0, running, 0, finished)


def test_trace_of_an_engine(tmp_path: Path) -> None:
    trace = IterationTrace(tmp_path / "trace.json")
    request = Request("r", [1, 2, 3], SamplingParams(), 7.0)
    sequence = Sequence(0, FinetuneJob("job", [400], [400]), 0, 400)
    plan = StepPlan((InferenceChunk(request, 0, 3, True),), (TokenWindow(sequence, 0, 8),), slack=math.inf, predicted=0.2)
    trace.iteration(plan, StepResult({}, (), start=7.5, end=7.75), 1, 2)
    trace.aborted(request, 7.75)
    trace.close()
    (it,) = read_trace(tmp_path / "trace.json", start=7.0)
    assert (it.start, it.end, it.prefill, it.window, it.finished) == (0.5, 0.75, 3, 8, 1)
    assert it.slack == math.inf
    assert (it.running, it.waiting) == (1, 2)


def test_a_rate_is_spread_over_the_time_of_iterations() -> None:
    iterations = [training(0.75), training(1.25)]
    assert spread(iterations, lambda it: it.window, [0.0, 1.0, 2.0]) == pytest.approx([25.0, 75.0])
    assert finetune_rate(iterations, LAYERS, (0.75, 1.75)) == pytest.approx([100.0])


def test_giving_way_counts_from_the_iteration_the_request_reached() -> None:
    prompt = [training(0.0), serving(0.5, prefill=9), serving(1.0)]
    assert gives_way(prompt, burst_start=0.2)["gives_way_iterations"] == 1
    waits = [training(0.0), Iteration(0.5, 0.5, 0.5, 1.0, 0, 0, 50, 0, running=0, waiting=1), serving(1.0, prefill=9)]
    found = gives_way(waits, burst_start=0.2)
    assert found["gives_way_iterations"] == found["newcomer_iterations_max"] == 2
    too_long = [training(0.0), serving(0.5, prefill=9, window=50, predicted=0.7), serving(1.0, window=5)]
    found = gives_way(too_long, burst_start=0.2)
    assert (found["gives_way_iterations"], found["newcomer_iterations_max"]) == (2, 1)
    assert (found["planned_within_slack"], found["shared_iterations"]) == (0.5, 2)


def test_a_newcomer_is_seen_even_if_another_request_ends_in_the_same_iteration() -> None:
    iterations = [serving(0.0), serving(0.5), serving(1.0, prefill=9, finished=1), serving(1.5, running=0, finished=1), training(2.0)]
    assert arrivals_seen(iterations) == [(0, True), (2, False)]


def test_nothing_that_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the 1 iterations"):
        iterations_until([training(0.0)], 0, lambda it: it.serves)


def test_coming_back() -> None:
    busy = [serving(0.5 * i) for i in range(8)]
    resumed = [training(4.0 + 0.5 * i) for i in range(4)]
    assert comes_back([*busy, *resumed], LAYERS, usual=100.0, after=3.0) == pytest.approx(0.8, abs=0.051)  # 0.2 s of [3.8, 4.8) are idle
    assert comes_back([*busy, *resumed], LAYERS, usual=100.0, after=4.0) == 0.0
    assert comes_back(busy, LAYERS, usual=100.0, after=2.0) is None


def test_seconds_of_the_run() -> None:
    record = RequestRecord(due=0.2, prompt_tokens=4, output_tokens=3, first=0.9, last=1.6, gaps=[0.3, 0.4])
    failed = RequestRecord(due=1.1, prompt_tokens=4, error="gone")
    columns = by_second([record, failed], [training(0.0), training(0.5), serving(1.0), serving(1.5)], LAYERS)
    assert columns["arrivals"] == [1, 1]
    assert columns["in_flight"] == [1, 1]
    assert columns["output_tok_s"] == [1, 2]
    assert columns["p99_gap_ms"] == [None, pytest.approx(399.0)]
    assert columns["finetune_forward_tok_s"] == columns["finetune_backward_tok_s"] == pytest.approx([100.0, 0.0])


def test_figures_before_during_and_after() -> None:
    records = [
        RequestRecord(due, 4, 2, due + 0.1, due + 0.1 + gap, gap, [gap]) for due, gap in ((1.0, 0.1), (4.1, 0.9), (4.2, 0.1), (7.0, 0.1))
    ]
    iterations = [training(0.5 * i) for i in range(8)]
    iterations += [serving(4.0 + 0.5 * i, prefill=9 * (i == 0)) for i in range(2)] + [serving(5.0, running=0, finished=1)]
    iterations += [training(5.5 + 0.5 * i) for i in range(8)]
    found = figures(records, iterations, LAYERS, slo=(1.0, 0.5), burst=(4.0, 6.0), seconds=9.0)
    assert found["attainment"] == {"before": 1.0, "during": 0.5, "after": 1.0}
    assert found["finetune_tok_s"] == pytest.approx({"before": 100.0, "during": 25.0, "after": 100.0})
    assert found["max_gap_ms"]["during"] == pytest.approx(900.0)
    assert (found["gives_way_iterations"], found["finetune_tok_s_usual"]) == (1, pytest.approx(100.0))
    assert found["burst_over_at"] == pytest.approx(5.1)
    assert found["comes_back_seconds"] == pytest.approx(0.2, abs=0.051)


def test_the_burst_opens_with_a_jump() -> None:
    arrivals = burst_load(0.5, 8.0, 5, (100.0, 150.0), 200.0, (16, 8), seed=3)
    times = [a.time for a in arrivals]
    assert times == sorted(times)
    assert times[-1] < 200.0
    assert times.count(100.0) == 5
    rate_before, rate_in = sum(t < 100 for t in times) / 100, sum(100 < t < 150 for t in times) / 50
    assert rate_in > 4 * rate_before
