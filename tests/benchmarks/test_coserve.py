"""Who takes part in the co-serving grid, and when."""

from __future__ import annotations

import argparse

import pytest

from coserve import options, phases, training_servers
from grid import slos_here

CONTESTANTS = dict.fromkeys(["inference", "coserve-loose", "finetune", "split", "coserve-mid", "temporal-128"])


def test_contestants_take_turns_and_the_costly_ones_come_once() -> None:
    paired = ["inference", "coserve-loose", "finetune", "split"]
    assert phases(CONTESTANTS, 2) == [
        *((0, name) for name in [*paired, "coserve-mid", "temporal-128"]),
        *((1, name) for name in paired),
    ]


def test_servers_are_told_their_own_objectives() -> None:
    slos = slos_here(2.0)
    found = training_servers(argparse.Namespace(quick=False, temporal=[64, 0]), slos)
    assert list(found) == ["coserve-loose", "coserve-mid", "coserve-strict", "temporal-64", "temporal-dynamic"]
    assert found["coserve-strict"] == ("--slo-ttft", "0.5000", "--slo-tpot", "0.1000")
    assert found["temporal-dynamic"] == ("--mode", "temporal", "--temporal-steps", "0", "--slo-ttft", "5.0000", "--slo-tpot", "0.0900")
    assert "coserve-mid" not in training_servers(argparse.Namespace(quick=True, temporal=[]), slos)


def test_every_load_needs_a_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["coserve.py", "--rates", "1", "2"])
    with pytest.raises(SystemExit):
        options()
    assert "light, mid, heavy" in capsys.readouterr().err
