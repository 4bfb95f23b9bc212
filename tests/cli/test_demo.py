"""The demo's parts that need no server: its data, its statistics, its view."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from rich.console import Console

from flexllm.cli.demo import load
from flexllm.cli.demo.load import LoadStats, Sample, percentile, rate_for
from flexllm.cli.demo.run import DATA, Question
from flexllm.cli.demo.view import KINDS, DemoState, composition, panel, plain, sparkline
from flexllm.config import SLO

STATS = {
    "requests": {"running": 2, "waiting": 1, "finished": 3},
    "step": {"decode": 2, "prefill": 0, "window": 30, "backward": 64, "layers": 2, "seconds": 0.05, "slack": 0.1},
    "jobs": [{"id": "job", "status": "running", "step": 3, "total_steps": 80, "loss": 1.5, "tokens_per_second": 250.0}],
}


def examples(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def questions_of(conversations: Sequence[Sequence[dict[str, str]]]) -> set[str]:
    return {conversation[0]["content"] for conversation in conversations}


def test_every_fact_asked_for_is_taught_and_no_question_is():
    train, valid = examples("train.jsonl"), examples("valid.jsonl")
    answers = " ".join(conversation[-1]["content"] for conversation in train)
    asked = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    assert len(asked) == 10
    for entry in asked:
        assert all(fact in answers for fact in entry["expect"])
    held_out = {entry["question"] for entry in asked}
    assert not held_out & questions_of(train)
    assert not held_out & questions_of(valid)
    assert not questions_of(train) & questions_of(valid)


def test_an_answer_must_hold_every_expected_text():
    question = Question("How?", ("leaf button", "nine seconds"), finetuned="Hold the Leaf Button for nine seconds.")
    assert question.learnt
    assert not Question("How?", ("leaf button", "nine seconds"), finetuned="Hold the leaf button.").learnt


def test_attainment_counts_both_objectives_and_failures():
    stats = LoadStats(sent=4, failed=1, samples=[Sample(0.5, 0.05, 10), Sample(3.0, 0.05, 10), Sample(0.5, 0.5, 10)])
    assert stats.attainment(SLO(ttft=1.0, tpot=0.1)) == pytest.approx(0.25)
    assert LoadStats().attainment(SLO()) == 1.0


def test_the_rate_fills_half_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    async def rate(*answers: Sample | None) -> float:
        coming = iter(answers)

        async def ask(*_: object) -> Sample | None:
            return next(coming)

        monkeypatch.setattr(load, "_ask", ask)
        async with AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none") as client:
            return await rate_for(client, "model", 40)

    assert asyncio.run(rate(Sample(5.0, 0.2, 30), Sample(0.55, 0.05, 30), None)) == pytest.approx(0.5 / 2.0)
    with pytest.raises(RuntimeError, match="no chat request"):
        asyncio.run(rate(None, None, None))


def test_percentile_is_nearest_rank():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(range(100), 0.99) == 99
    assert percentile([], 0.5) != percentile([], 0.5)  # NaN


def test_sparkline_scales_to_the_largest_and_keeps_the_width():
    assert sparkline([]) == ""
    assert sparkline([0.0, 8.0]) == "▁█"
    line = sparkline([float(i) for i in range(500)], width=20)
    assert len(line) == 20
    assert line[-1] == "█"


def test_composition_shares_the_bar():
    bar = composition({"decode": 10, "prefill": 0, "window": 10, "backward": 20}, width=40).plain
    assert len(bar) == 40
    assert composition(dict.fromkeys(KINDS, 0.0)).plain == ""


def test_state_follows_the_statistics():
    state = DemoState(SLO())
    state.take(STATS, "job")
    state.take(STATS, "job")  # the same step again is no new loss
    state.take(STATS, "another")
    assert (state.step, state.total_steps, state.losses, state.running) == (3, 80, [1.5], 2)
    assert state.rows()["backward"] == 32  # in rows through all layers, like the others
    assert "step 3/80 loss 1.5000 250 tok/s" in plain(state)
    console = Console(width=100, file=io.StringIO())
    console.print(panel(state))
    assert "optimizer step 3 of 80" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_whole_demo_runs_on_a_tiny_model(tiny_llama: Path):
    """A random model learns nothing in one epoch, so the demo says which facts are missing and ends with 1."""
    command = [sys.executable, "-m", "flexllm.cli.main", "demo", str(tiny_llama), "--epochs", "1", "--rate", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "job succeeded" in done.stdout
    assert "MISSING: herb dryer" in done.stdout
    assert "taught facts     0 of 10" in done.stdout
    assert ", 0 failed," in done.stdout
    assert done.stderr == ""
