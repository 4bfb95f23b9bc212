"""Who takes part in the co-serving grid, when, and under which settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import coserve
from coserve import Setting, contestant_names, estimated_seconds, measure_cell, options, phases, scheduler_settings, training_cores
from flexllm.config import SchedulerConfig
from flexllm.server.wire import SchedulerPatch
from flexllm.simulate.workload import Arrival
from grid import Phase, slos_here
from workloads import Load, Trace


def arguments(**changes: Any) -> argparse.Namespace:
    found = {"quick": False, "temporal": [64, 0], "vllm_python": Path("python"), "rounds": 2, "seconds": 8.0, "seed": 0, "cores": [0, 1]}
    return argparse.Namespace(
        **{**found, "rates": None, "traces": ["bursty"], "contestants": None, "loads": ["light", "mid", "heavy"], **changes}
    )


def test_contestants_take_turns_and_the_costly_ones_come_once() -> None:
    paired = ["inference-loose", "coserve-loose", "finetune", "inference-strict", "coserve-strict", "split"]
    others = ["inference-mid", "coserve-mid", "temporal-64", "temporal-dynamic", "contending"]
    names = contestant_names(arguments())
    assert names == [*paired, *others]
    assert phases(names, 2) == [*((0, name) for name in names), *((1, name) for name in paired)]
    alone = contestant_names(arguments(quick=True, vllm_python=None, temporal=[128]))
    assert alone == ["inference-loose", "coserve-loose", "finetune", "inference-strict", "coserve-strict", "temporal-128"]
    assert contestant_names(arguments(contestants=["coserve-mid", "finetune"])) == ["finetune", "coserve-mid"]


def test_a_machine_is_split_into_quarters_where_it_has_them() -> None:
    assert training_cores([0]) == {}
    assert training_cores([2, 5]) == {"split": [5]}
    assert training_cores(range(3)) == {"split": range(1, 3)}
    assert training_cores(range(8)) == {"split": range(4, 8), "split-25": range(6, 8), "split-75": range(2, 8)}
    assert all(1 <= len(t) < n for n in range(2, 20) for t in training_cores(range(n)).values())
    names = contestant_names(arguments(cores=range(8)))
    assert [name for turn, name in phases(names, 2) if turn == 1 and "split" in name] == ["split", "split-25", "split-75"]
    assert contestant_names(arguments(cores=[0]))[-1] == "contending"


def test_one_server_is_each_of_ours_by_its_settings() -> None:
    slos = slos_here(2.0)
    found = {
        name: SchedulerPatch(**scheduler_settings(name, slos)).apply(SchedulerConfig(mode="finetune"))
        for name in contestant_names(arguments(vllm_python=None))
    }
    modes = {name: config.mode for name, config in found.items()}
    assert {modes.pop(f"inference-{slo}") for slo in slos} == {"inference"}
    assert {modes.pop("temporal-64"), modes.pop("temporal-dynamic")} == {"temporal"}
    assert set(modes.values()) == {"coserve"}
    assert (found["temporal-64"].temporal_inference_steps, found["temporal-dynamic"].temporal_inference_steps) == (64, 0)
    objectives = {name: (config.slo.ttft, config.slo.tpot) for name, config in found.items()}
    for mode in ("inference", "coserve"):
        assert all(objectives.pop(f"{mode}-{slo}") == slos[slo] for slo in slos)
    assert set(objectives.values()) == {slos["loose"]}


def cell(args: argparse.Namespace, tmp_path: Path) -> tuple[list[Any], dict[str, list[Load]]]:
    """A cell in which `split` fails, and what was asked of whom."""
    asked: dict[str, list[Load]] = {name: [] for name in contestant_names(args)}

    def runner(name: str) -> coserve.Run:
        def run(load: Load) -> Phase:
            asked[name].append(load)
            if name == "split":
                raise RuntimeError("its server is gone")
            return Phase([], load.seconds, load.seconds, 1.0, None)

        return run

    trace = Trace("t", "made up", [Arrival(float(i), 10 + i, 5) for i in range(100)])
    setting = Setting(args, tmp_path, 5000, [trace], tmp_path)
    samples = measure_cell(setting, {name: runner(name) for name in asked}, trace, "mid", 1.0, 0, lambda _: None)
    return samples, asked


def test_baselines_have_the_first_of_the_same_requests(tmp_path: Path) -> None:
    samples, asked = cell(arguments(), tmp_path)
    first, second = asked["inference-strict"]
    assert [len(first.arrivals), len(second.arrivals)] == [8, 8]
    assert first.prompts != second.prompts
    assert asked["coserve-strict"] == asked["inference-strict"]
    (half,) = asked["temporal-64"]
    assert (half.seconds, half.arrivals, half.prompts) == (4.0, first.arrivals[:4], first.prompts[:4])
    assert [(load.seconds, load.arrivals) for load in asked["finetune"]] == [(4.8, [])] * 2
    assert {s.as_dict()["seconds"] for s in samples} == {8.0, 4.0, 4.8}


def test_one_that_fails_is_left_out(tmp_path: Path) -> None:
    samples, asked = cell(arguments(), tmp_path)
    assert len(asked["split"]) == 2
    assert {s.contestant for s in samples} == {*asked} - {"split"}


def test_the_estimate_counts_every_phase() -> None:
    short, long = (estimated_seconds(arguments(seconds=s)) for s in (8.0, 16.0))
    per_cell = 2 * 5 * 8.0 + 2 * 0.6 * 8.0 + 5 * 0.5 * 8.0
    assert long - short == pytest.approx(3 * per_cell)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rates", "1", "2"], "light, mid, heavy"),
        (["--rates", "1", "2", "--loads", "mid"], "loads mid"),
        (["--contestants", "coserve-loose", "split"], "no 'split'"),  # without --vllm-python
    ],
)
def test_options_that_do_not_go_together(
    given: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["coserve.py", *given])
    with pytest.raises(SystemExit):
        options()
    assert says in capsys.readouterr().err
