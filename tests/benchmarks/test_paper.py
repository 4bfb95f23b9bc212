"""The paper's experiment, small: contestants do what their names say, and ratios are taken between those that they name."""

from __future__ import annotations

from itertools import pairwise

import pytest

from paper import CONTESTANTS, FIGURES, PAPER, PIPELINES, Experiment, arrivals, paper_figures, repeated, speedup, table

SECONDS = 5.0


def test_arrivals_come_at_the_rate_asked_for():
    trace = arrivals(20, SECONDS, seed=0)
    assert len(trace) == pytest.approx(20 * SECONDS, rel=0.5)
    assert all(a.time <= b.time for a, b in pairwise(trace))
    twice = repeated(trace, 2 * SECONDS)
    assert len(trace) < len(twice)
    assert twice[-1].time < 2 * SECONDS


def test_co_serving_finetunes_less_than_dedicated_pipelines_and_serving_alone_not_at_all():
    experiment = Experiment("llama-3.1-8b", SECONDS, seed=0)
    both, alone = experiment.run("coserve", 4), experiment.run("inference", 4)
    assert set(both) == set(FIGURES)
    assert 0 < both["finetune_tok_s"] < 1.1 * PIPELINES * experiment.dedicated()
    assert alone["finetune_tok_s"] == 0
    assert both["mean_tpot_ms"] > alone["mean_tpot_ms"]


def rows(attainments: dict[str, float]) -> dict[str, object]:
    figures = {"finetune_tok_s": 100.0, "attainment": 1.0, "mean_tpot_ms": 1.0, "p99_tpot_ms": 1.0}
    found = {c: {4: figures | {"attainment": attainments.get(c, 1.0)}, 20: figures} for c in CONTESTANTS}
    return table("llama-3.1-8b", found, dedicated=20.0, rates=[4, 20])


def test_the_speedup_is_over_the_largest_split_that_attains():
    found = rows({"separate-75": 0.8})
    assert found["dedicated"] == {"finetune_tok_s": 80.0}
    assert found["separate-50"]["finetune_tok_s"] == [40.0, 40.0]
    assert found["speedup_vs_separate"] == [100 / 40, 100 / 60]
    assert speedup(rows(dict.fromkeys(CONTESTANTS, 0.0)), 0) is None


def test_the_papers_figures_are_for_all_pipelines():
    assert paper_figures()["llama-3.1-8b"]["finetune_tok_s"] == [4 * 2352, 4 * 1799]
    assert paper_figures().keys() == PAPER.keys()
