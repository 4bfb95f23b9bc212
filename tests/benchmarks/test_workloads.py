"""Traces: what is taken from them is what was asked for, recorded or made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexllm.simulate.workload import Arrival
from workloads import MAX_OUTPUT, MAX_PROMPT, MIN_OUTPUT, SKIPPED, TRACES, Trace, load_of, shorter_here


def recorded(folder: Path, count: int) -> None:
    rows = [f"{i * 0.5},{80 * (i % 70 + 1)},{4 * (i % 130 + 1)}" for i in range(count)]
    (folder / "azure2023_conv_min00-30.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))


def test_recorded_lengths_are_scaled_and_capped(tmp_path: Path) -> None:
    recorded(tmp_path, SKIPPED + 200)
    trace = Trace.named("azure-conv", tmp_path, seed=0)
    assert "azure2023_conv_min00-30.csv" in trace.source
    assert len(trace.arrivals) == 200
    index = SKIPPED
    assert trace.arrivals[0].prompt_tokens == min(MAX_PROMPT, 10 * (index % 70 + 1))
    assert trace.arrivals[0].output_tokens == min(MAX_OUTPUT, index % 130 + 1)
    assert {max(a.prompt_tokens for a in trace.arrivals), max(a.output_tokens for a in trace.arrivals)} == {MAX_PROMPT, MAX_OUTPUT}
    assert min(a.output_tokens for a in trace.arrivals) == MIN_OUTPUT


def test_requests_are_shorter_on_a_slow_machine(tmp_path: Path) -> None:
    assert [shorter_here(h) for h in (0.5, 2.2, 3.2, 6.6)] == [1, 1, 1, 3]
    recorded(tmp_path, SKIPPED + 200)
    trace = Trace.named("azure-conv", tmp_path, seed=0, shorter=3)
    assert trace.arrivals[0].prompt_tokens == min(MAX_PROMPT // 3, round(10 / 3 * (SKIPPED % 70 + 1)))
    assert {max(a.prompt_tokens for a in trace.arrivals), max(a.output_tokens for a in trace.arrivals)} == {85, 21}
    assert min(a.output_tokens for a in trace.arrivals) == MIN_OUTPUT
    assert "at most 85" in trace.source
    assert "42 / 16 tokens" in Trace.named("bursty", tmp_path, seed=0, shorter=3).source


@pytest.mark.parametrize("name", TRACES)
def test_without_the_recording_a_stand_in_says_so(name: str, tmp_path: Path) -> None:
    trace = Trace.named(name, tmp_path, seed=3)
    assert trace == Trace.named(name, tmp_path, seed=3) != Trace.named(name, tmp_path, seed=4)
    recording = TRACES[name][0]
    assert trace.source.startswith("Gamma")
    assert recording is None or f"in place of {recording}" in trace.source


def test_a_load_has_the_rate_and_the_shape_of_the_trace() -> None:
    times = [0.0, 1.0, 1.5, 10.0, 20.0, 20.5, 30.0, 31.0]
    trace = Trace("t", "made up", [Arrival(t, 10 + i, 5) for i, t in enumerate(times)])
    taken = trace.take(1, rate=0.5, seconds=6.0)
    assert [a.prompt_tokens for a in taken] == [11, 12, 13]
    assert [a.time for a in taken] == pytest.approx([0.0, 6 * 0.5 / 19, 6 * 9 / 19])  # from 1.0 to the next arrival, at 20.0


def test_a_trace_begins_again_and_never_gives_nothing() -> None:
    trace = Trace("t", "made up", [Arrival(float(t), 10 + t, 5) for t in range(10)])
    assert trace.take(7 + 8, 0.3, 10.0) == trace.take(1, 0.3, 10.0)
    assert len(trace.take(0, 0.001, 10.0)) == 1
    with pytest.raises(ValueError, match="10 arrivals, 20"):
        trace.take(0, 2.0, 10.0)


def test_arrivals_at_one_time_stay_at_one_time() -> None:
    trace = Trace("t", "made up", [Arrival(5.0, 10, 5)] * 4)
    assert [a.time for a in trace.take(0, 1.0, 3.0)] == [0.0, 0.0, 0.0]


def test_prompts_have_the_lengths_asked_for() -> None:
    load = load_of([Arrival(0.0, 7, 5), Arrival(1.0, 3, 5)], 2.0, vocab_size=5000, seed=1)
    assert [len(p) for p in load.prompts] == [7, 3]
