"""`flexllm trace` on a small recording."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import pytest

from flexllm.cli.main import run
from flexllm.cli.trace import Recording, whole
from flexllm.core import FinetuneJob, InferenceChunk, JobEvent, Request, SamplingParams, Sequence, StepPlan, StepResult, TokenWindow
from flexllm.tracing import IterationTrace

PICTURES = ("make_up", "prediction", "slack", "throughput")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Forty iterations of 10 ms, one every 20 ms: a decode row each, every other with a window of 8 rows; one is late."""
    path = tmp_path / "trace.json"
    trace = IterationTrace(path)
    request = Request("r", [1, 2, 3], SamplingParams(), 0.0)
    job = FinetuneJob("job", [400], [400])
    sequence = Sequence(0, job, 0, 400)
    for i in range(40):
        windows = (TokenWindow(sequence, 8 * i, 8 * i + 8),) if i % 2 else ()
        plan = StepPlan((InferenceChunk(request, 3 + i, 4 + i, True),), windows, slack=0.005 if i == 7 else 0.05, predicted=0.008)
        events = (JobEvent("job", "step", i, loss=1.0),) if i == 20 else ()
        trace.iteration(plan, StepResult({"r": None}, start=5 + 0.02 * i, end=5.01 + 0.02 * i, events=events), 1, 0)  # type: ignore[dict-item]
    trace.close()
    return path


def test_tables(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", str(file)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"decode\+window .* 20 .* 50\.0%", text)
    assert "+25%" in text, "of 8 ms predicted, 10 ms"
    figures = dict(whole(Recording.load(file)))
    assert figures["recorded"] == "0.8 s, 40 iterations"
    assert figures["idle between iterations"] == "49.4%"
    assert figures["finetuning rows forward"] == "202.5 per second"
    assert figures["iterations longer than their slack"] == "1 of 40 (2.5%)"
    assert figures["optimizer steps"] == "1"


def test_pictures(file: Path, tmp_path: Path) -> None:
    assert run(["trace", str(file), "--html", str(tmp_path / "report.html"), "--png", str(tmp_path / "png")]) == 0
    report = (tmp_path / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', report)]
    assert [d[:8] for d in embedded] == [b"\x89PNG\r\n\x1a\n"] * len(PICTURES)
    assert embedded == [(tmp_path / "png" / f"{name}.png").read_bytes() for name in PICTURES]
    assert "decode+window" in report
    assert not re.search(r'(src|href)="(?!data:)', report), "it needs nothing else"


def test_without_matplotlib(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["trace", str(file), "--png", str(tmp_path)]) == 2
    assert 'pip install "flexllm-engine[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "is not a trace"), ("[\n]\n", "no iterations"), ('[\n{"ph":"X"}', "something else"), (None, "No such file")],
)
def test_other_files(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "f.json").write_text(content)
    assert run(["trace", str(tmp_path / "f.json")]) == 2
    assert message in capsys.readouterr().err
