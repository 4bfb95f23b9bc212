"""The validation of the simulator finds a machine's factor on inference alone, and says how far off co-serving is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexllm.config import SLO
from flexllm.core import FinetuneJob, SaveLevel
from flexllm.scheduler.latency import LINEAR, SEGMENTS
from flexllm.simulate.workload import poisson_arrivals
from simulate import CONTESTANTS, Factors, Model, arrivals, by_trace, figures, validate, worst

SECONDS, SLOWER = 20.0, Factors(1.3, 1.2)
SLOS = {"loose": SLO(5.0, 0.2), "strict": SLO(0.5, 0.08)}
COEFFICIENTS = {**dict.fromkeys(LINEAR, 0.0), "t0": 2e-2, "backward_rows": 1e-4, "prefill_pairs": 1e-7}
LENGTHS = [256] * 20
JOB = FinetuneJob("job", LENGTHS, LENGTHS, 1, epochs=1 << 20, num_layers=10, levels=(SaveLevel("recompute", 1),))
HERE = Model({"coefficients": COEFFICIENTS, "slopes": [5e-4] * SEGMENTS}, JOB, noise=0.1, seed=0)


def measured_on(model: Model, tuning: float = 1.0, delivery: float = 0.0) -> dict[str, Any]:
    """What coserve.py would have written on a machine that is SLOWER than its profile, finetunes `tuning` times as fast, and whose
    tokens are under way to the client for so many ms longer each time."""
    contestants: dict[str, Any] = {}
    samples = []
    for name, slo in CONTESTANTS.items():
        results = []
        for turn in range(2):
            trace = poisson_arrivals(1.0, SECONDS, 100, 30, length_cv=0.5, seed=turn)
            result = model.run(name, SLOS[slo], trace, SECONDS, SLOWER)
            requests = [
                {"due": r.arrival, "prompt_tokens": r.prompt_tokens, "output_tokens": r.output_tokens, "error": None}
                for r in result.records
            ]
            busy = SECONDS * (1 - result.shares["idle"])
            who = {"trace": "made-up", "load": "mid", "contestant": name, "round": turn}
            samples.append({**who, "elapsed": SECONDS, "busy_seconds": busy, "requests": requests[::-1]})
            results.append(result)
        found = figures(results, SLOS[slo])
        contestants[name] = {
            **found,
            "finetune_tok_s": tuning * found["finetune_tok_s"],
            "p50_tpot_ms": found["p50_tpot_ms"] + delivery,
            "attainment": dict.fromkeys(SLOS, found["attainment"]),
        }
    contestants["finetune"] = {"finetune_tok_s": model.run("coserve-loose", SLOS["loose"], [], 60.0, SLOWER).finetune_rate}
    return {
        "slos": {name: {"ttft_s": slo.ttft, "tpot_s": slo.tpot} for name, slo in SLOS.items()},
        "cells": [{"trace": "made-up", "load": "mid", "contestants": contestants}],
        "samples": samples,
    }


def test_a_machine_like_the_simulated_one_is_predicted():
    workloads = validate(measured_on(replace(HERE, seed=7)), HERE)
    assert [w["contestant"] for w in workloads] == list(CONTESTANTS)
    for workload in workloads:
        assert workload["factors"] == pytest.approx(SLOWER._asdict(), rel=0.05)
        simulated, measured = workload["simulated"], workload["measured"]
        assert simulated.keys() == measured.keys()
        assert simulated["attainment"] == pytest.approx(measured["attainment"], abs=0.1)
        if "finetune_tok_s" in measured:
            assert simulated["finetune_tok_s"] == pytest.approx(measured["finetune_tok_s"], rel=0.15)
    alone, _, loose, strict = (w["simulated"].get("finetune_tok_s") for w in workloads)
    assert alone is None
    assert loose > strict > 0


def test_finetuning_is_predicted_and_not_fitted():
    workloads = validate(measured_on(HERE, tuning=0.5), HERE)
    tuned = by_trace(workloads)["made-up"]["finetune_tok_s"]
    assert tuned["ratio"] == tuned["simulated"] / tuned["measured"] == pytest.approx(2.0, rel=0.1)


def test_what_the_client_adds_is_no_work_of_the_engine():
    slow_client = validate(measured_on(HERE, delivery=10.0), HERE)
    assert slow_client[0]["factors"] == pytest.approx(SLOWER._asdict(), rel=0.05)


def test_requests_are_rebuilt_in_order_and_a_failed_one_counts_as_a_token():
    requests = [{"due": 2.0, "prompt_tokens": 5, "output_tokens": 0}, {"due": 1.0, "prompt_tokens": 6, "output_tokens": 3}]
    assert [(a.time, a.prompt_tokens, a.output_tokens) for a in arrivals(requests)] == [(1.0, 6, 3), (2.0, 5, 1)]


def test_the_worst_ratio_is_the_furthest_from_one_either_way():
    assert worst([1.2, None, 0.5, 1.9]) == 0.5
    assert worst([None]) is None
