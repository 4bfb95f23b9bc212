"""Traces are read as they were recorded, and scaled without losing what makes them bursty."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexllm.simulate.workload import Arrival, gamma_arrivals, load_trace, poisson_arrivals, scaled, scaled_lengths, window


def test_a_scaled_trace_keeps_its_order_lengths_and_relative_gaps():
    trace = gamma_arrivals(5, 60, 100, 20, cv=3.0, length_cv=1.0)
    slow = scaled(trace, rate=0.5)
    assert len(slow) / slow[-1].time == pytest.approx(0.5)
    assert [(a.prompt_tokens, a.output_tokens) for a in slow] == [(a.prompt_tokens, a.output_tokens) for a in trace]
    factor = slow[-1].time / trace[-1].time
    for i in range(1, len(trace)):
        assert slow[i].time - slow[i - 1].time == pytest.approx(factor * (trace[i].time - trace[i - 1].time))


def test_generators_are_seeded_and_have_the_rate_and_lengths_asked_for():
    trace = poisson_arrivals(20, 200, 100, 10, length_cv=0.5, seed=1)
    assert trace == poisson_arrivals(20, 200, 100, 10, length_cv=0.5, seed=1) != poisson_arrivals(20, 200, 100, 10, length_cv=0.5, seed=2)
    assert len(trace) / 200 == pytest.approx(20, rel=0.1)
    assert sum(a.prompt_tokens for a in trace) / len(trace) == pytest.approx(100, rel=0.1)
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(0, 1, 1, 1)


def test_lengths_are_scaled_and_capped_and_a_window_starts_at_zero():
    trace = [Arrival(1.0, 100, 1), Arrival(2.0, 1000, 50), Arrival(9.0, 1, 1)]
    assert scaled_lengths(trace, 0.1, 50, 4) == [Arrival(1.0, 10, 1), Arrival(2.0, 50, 4), Arrival(9.0, 1, 1)]
    assert window(trace, 1.0, 5.0) == [Arrival(0.0, 100, 1), Arrival(1.0, 1000, 50)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ours.csv", "arrival_s,prompt_tokens,output_tokens,adapter\n3.5,20,4,b\n2.0,10,3,\n"),
        (
            "azure.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:02.0000000,10,3\n2023-11-16 18:17:03.5000000,20,4\n",
        ),
        (
            "mooncake.jsonl",
            '{"timestamp": 0, "input_length": 10, "output_length": 3}\n{"timestamp": 1500, "input_length": 20, "output_length": 4}\n',
        ),
    ],
)
def test_traces_are_read_in_order_of_time_from_zero(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    first, second = load_trace(tmp_path / name)
    assert (first, second.time, second.prompt_tokens, second.output_tokens) == (Arrival(0.0, 10, 3), 1.5, 20, 4)
    assert second.adapter == ("b" if name == "ours.csv" else None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "1,2,3"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n"),
        ("a.csv", "when,what\n1,2\n"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n0,0,1\n"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\nnan,1,1\n"),
        ("a.jsonl", "not json\n"),
    ],
)
def test_a_file_that_is_no_trace_is_named(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="a\\."):
        load_trace(tmp_path / name)
