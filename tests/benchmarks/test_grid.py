"""The figures of the co-serving grid, from made-up records."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client import RequestRecord
from contestants import completed
from grid import Phase, Sample, attainment, cell_figures, contestant_figures, difference, grid_figures, rows_per_second, slos_here

ROW = 0.1  # seconds
SLOS = {"loose": (5.0, 0.1), "mid": (0.4, 0.3), "strict": (0.5, 0.05)}


def record(ttft: float = 0.2, tpot: float = 0.04, tokens: int = 11, due: float = 0.0, error: str | None = None) -> RequestRecord:
    gaps = [tpot] * (tokens - 1)
    return RequestRecord(due, 10, tokens, due + ttft, due + ttft + sum(gaps), max(gaps), gaps, error)


def sample(contestant: str, turn: int, rate: float, busy: float | None = None, records: list[RequestRecord] | None = None) -> Sample:
    return Sample("t", "mid", contestant, turn, Phase([record()] if records is None else records, 10.0, 10.0, rate, busy))


def test_only_tpot_scales_with_the_machine() -> None:
    assert slos_here(2.0) == {"loose": (5.0, 0.090), "mid": (0.4, 0.240), "strict": (0.5, 0.100)}


def test_attainment_needs_both_objectives_and_an_answer() -> None:
    unanswered = RequestRecord(0.0, 10, error="not answered")
    records = [record(), record(ttft=0.6), record(tpot=0.06), record(error="broken"), unanswered]
    assert attainment(records, SLOS["strict"]) == 1 / 5
    assert attainment(records, SLOS["loose"]) == 3 / 5
    assert attainment([], SLOS["loose"]) is None


def test_a_contestant_pools_its_rounds_and_is_judged_by_every_slo() -> None:
    phases = [Phase([record(), record(error="broken")], 9.0, 10.0, 100.0, 5.0), Phase([record(ttft=0.6, tpot=0.02)], 9.0, 10.0, 300.0, 7.0)]
    found = contestant_figures("coserve-strict", phases, SLOS)
    assert found["finetune_tok_s"] == 200.0
    assert found["busy"] == pytest.approx(0.6)
    assert found["attainment"] == pytest.approx({"loose": 2 / 3, "mid": 1 / 3, "strict": 1 / 3})
    assert found["goodput_req_s"] == 1 / 20  # by its own objectives, the strict ones
    assert contestant_figures("inference-loose", phases, SLOS)["goodput_req_s"] == 2 / 20
    assert (found["requests"], found["failed"]) == (3, 1)
    assert found["max_gap_ms"] == pytest.approx(40.0)


def test_output_rate_counts_the_time_until_the_last_answer() -> None:
    assert contestant_figures("split", [Phase([record(tokens=10, due=9.0)], 10.0, 12.5, 1.0, None)], SLOS)["output_tok_s"] == 10 / 12.5


def test_a_contestant_without_a_good_request_has_no_latencies() -> None:
    found = contestant_figures("contending", [Phase([record(error="late")], 10.0, 10.0, 5.0, None)], SLOS)
    assert found["p99_ttft_ms"] is found["p99_tpot_ms"] is found["max_gap_ms"] is found["busy"] is None
    assert found["attainment"]["loose"] == 0.0


def cell() -> list[Sample]:
    return [
        *(sample(f"inference-{slo}", i, 0.0, busy) for i, busy in enumerate([5.0, 6.0, 8.0]) for slo in SLOS),
        *(sample("finetune", i, rate, 1.0, []) for i, rate in enumerate([200.0, 100.0, 400.0])),
        *(sample("coserve-loose", i, rate, 1.0) for i, rate in enumerate([150.0, 60.0, 200.0])),
        *(sample("split", i, rate, None, [record(ttft=0.45)]) for i, rate in enumerate([100.0, 80.0, 100.0])),
        sample("coserve-mid", 0, 50.0, 1.0),
    ]


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    found = cell_figures(cell(), SLOS, ROW)
    assert found["speedup_vs_split"] == {"loose": 1.5, "mid": 0.5, "strict": None}  # of 1.5, 0.75, 2; mid has one round
    assert found["idle_share"] == {"loose": pytest.approx(0.4), "mid": pytest.approx(0.5), "strict": None}
    assert found["leftover_efficiency"]["loose"] == pytest.approx(1.5)  # of 0.75 / 0.5, 0.6 / 0.4, 0.5 / 0.2
    assert found["leftover_efficiency"]["mid"] == pytest.approx(0.25 / 0.5)
    assert found["split_attains"] == {"loose": True, "mid": False, "strict": True}


def test_idle_is_what_requests_alone_leave_of_the_time_that_co_serving_took() -> None:
    slow = Sample("t", "mid", "coserve-loose", 0, Phase([record()], 10.0, 20.0, 150.0, 20.0))
    found = cell_figures([slow, *(s for s in cell() if s.contestant != "coserve-loose" and s.round == 0)], SLOS, ROW)
    assert found["idle_share"]["loose"] == pytest.approx(0.75)
    assert found["leftover_efficiency"]["loose"] == pytest.approx(0.75 / 0.75)


def test_rows_are_a_prompts_and_one_for_each_token_after_the_first() -> None:
    unanswered = RequestRecord(0.0, 10, error="not answered")
    assert rows_per_second(Phase([record(), record(tokens=5), unanswered], 10.0, 12.0, 1.0, None)) == pytest.approx((10 + 10 + 10 + 4) / 12)
    assert rows_per_second(Phase([], 10.0, 10.0, 1.0, None)) == 0.0


def test_the_bound_takes_from_training_what_the_rows_of_requests_cost() -> None:
    """20 rows in ten seconds, a tenth of a second each: four fifths are left."""
    found = cell_figures(cell(), SLOS, ROW)
    assert found["bound_tok_s"]["loose"] == pytest.approx(0.8 * 200)  # of 200, 100, 400
    assert found["bound_share"]["loose"] == pytest.approx(0.6 / 0.8)  # of 0.75, 0.6, 0.5
    assert found["bound_share"]["strict"] is None
    assert found["bound_vs_split"]["loose"] == pytest.approx(0.8 * 2)  # of 2, 1.25, 4
    assert found["bound_leftover"]["loose"] == pytest.approx(0.8 / 0.4)  # of 0.5, 0.4, 0.2
    beyond = cell_figures(cell(), SLOS, 10 * ROW)
    assert beyond["bound_tok_s"]["loose"] == beyond["bound_vs_split"]["loose"] == 0.0
    assert beyond["bound_share"]["loose"] is None


def test_requests_are_won_and_lost_in_pairs() -> None:
    late = record(ttft=6.0)
    found = cell_figures(
        [
            sample("inference-loose", 0, 0.0, 1.0, [record(), record(), late, late]),
            sample("coserve-loose", 0, 0.0, 1.0, [record(), late, record(), late]),
            sample("inference-loose", 1, 0.0, 1.0, [record()]),
            sample("coserve-loose", 1, 0.0, 1.0, [late]),
            sample("coserve-loose", 2, 0.0, 1.0, [late]),  # its partner failed
        ],
        SLOS,
        ROW,
    )
    assert found["traded"]["loose"] == {"requests": 5, "won": 1, "lost": 2}
    assert found["traded"]["strict"] == {"requests": 0, "won": 0, "lost": 0}


def test_the_interval_of_a_difference_of_pairs() -> None:
    assert difference([]) is difference([{"requests": 0, "won": 0, "lost": 0}]) is None
    apart, half = difference([{"requests": 60, "won": 1, "lost": 5}, {"requests": 38, "won": 2, "lost": 3}]) or (0.0, 0.0)
    assert apart == pytest.approx(-5 / 98)
    assert half == pytest.approx(1.96 * ((3.5 + 8.5 - 5**2 / 100) ** 0.5) / 100)
    assert (difference([{"requests": 50, "won": 0, "lost": 0}]) or (1.0, 0.0))[1] > 0.02, "50 requests are no certainty"


def test_without_a_split_there_is_no_ratio_to_it() -> None:
    found = cell_figures([s for s in cell() if s.contestant != "split"], SLOS, ROW)
    assert set(found["speedup_vs_split"].values()) == {None}
    assert set(found["bound_vs_split"].values()) == {None}
    assert not any(found["split_attains"].values())


def test_of_several_splits_the_best_counts_that_attains_the_slo() -> None:
    """Loose: all three attain it, and the second trains most. Mid: none does. Strict: the slowest alone."""
    more = [sample("split-75", 0, 120.0, None, [record(ttft=0.6)]), sample("split-25", 0, 50.0, None, [record(ttft=0.45)])]
    halves = [sample("split", i, 80.0, None, [record(ttft=0.55)]) for i in range(3)]
    found = cell_figures([*(s for s in cell() if s.contestant != "split"), *halves, *more], SLOS, ROW)
    assert found["best_split"] == {"loose": "split-75", "mid": "split-75", "strict": "split-25"}
    assert found["split_attains"] == {"loose": True, "mid": False, "strict": True}
    assert found["speedup_vs_split"]["loose"] == 150 / 120  # the round that both took part in


def test_no_idle_time_no_efficiency() -> None:
    full = [s if s.contestant != "inference-loose" else sample(s.contestant, s.round, 0.0, 10.0) for s in cell()]
    assert cell_figures(full, SLOS, ROW)["leftover_efficiency"]["loose"] is None


def test_the_grid_pools_requests_and_takes_medians_over_cells() -> None:
    one = cell()
    slow = Phase([record(ttft=6.0)] * 9, 10.0, 10.0, 40.0, 1.0)

    def in_other(s: Sample) -> Phase:
        if s.contestant == "inference-loose":
            return replace(s.phase, records=[record()] * 9)
        return slow if s.contestant == "coserve-loose" else s.phase

    other = [Sample("u", "mid", s.contestant, s.round, in_other(s)) for s in one]
    where = {"load": "mid"}
    cells = [{**where, **cell_figures(one, SLOS, ROW)}, {**where, **cell_figures(other, SLOS, ROW)}]
    found = grid_figures(cells, one + other, SLOS)
    assert found["attainment"] == 3 / 30
    assert found["attainment_inference_only"] == 1.0
    assert found["finetune_tok_s"] == (150 + 40) / 2
    assert found["speedup_vs_best_split"] == pytest.approx((1.5 + 0.4) / 2)
    mid = found["by_load"]["mid"]
    assert mid["loose"]["attainment"] == 3 / 30
    assert mid["loose"]["attainment_difference_95"][0] == -27 / 30
    assert mid["strict"]["attainment"] is None  # nobody was asked to keep them
    assert mid["loose"]["split_attains"]
    assert not mid["mid"]["split_attains"]


def test_a_grid_of_some_contestants_has_their_figures() -> None:
    samples = [s for s in cell() if s.contestant.endswith("strict")]
    where = {"trace": "t", "load": "mid"}
    found = grid_figures([{**where, **cell_figures(samples, SLOS, ROW)}], samples, SLOS)
    assert found["attainment"] is found["finetune_tok_s"] is found["leftover_efficiency"] is None
    assert found["by_load"]["mid"]["strict"]["attainment"] is None
    assert found["by_load"]["mid"]["strict"]["attainment_inference_only"] == 1.0
    assert found["by_load"]["mid"]["strict"]["leftover_efficiency"] is None


def test_capacity_counts_shares_of_requests() -> None:
    records = [record(ttft=1.0, tpot=0.5, tokens=4), record(ttft=0.0, tpot=0.5, tokens=2)]  # 1, 1.5, 2, 2.5 and 0, 0.5
    assert completed(records, [4, 2, 9], 0.4, 2.0) == pytest.approx(2 / 4 + 1 / 2)
