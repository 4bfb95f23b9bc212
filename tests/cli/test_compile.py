"""`flexllm compile` needs nothing but a config.json; what it says can be read, parsed and looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexllm.cli.main import run


def test_a_table_says_what_becomes_of_every_tensor(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "--config", str(llama_8b), "--target-modules", "down_proj", "--save-level", "keep"]) == 0
    out = capsys.readouterr().out
    assert "down_proj.lora_u" in out
    assert "d w.gate_up: the weight is frozen" in out
    assert "K/V pages, there anyway: 131,072 bytes per token" in out


def test_json_has_all_levels_of_any_method(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("lora", "ia3", "vera", "bottleneck", "prefix_tuning", "prompt_tuning"):
        assert run(["compile", "--config", str(llama_8b), "--peft", method, "--seq-length", "8192", "--batch", "2", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        levels = [level["level"] for level in report["levels"]]
        assert levels[:2] == ["keep", "recompute"]
        assert levels[-1] == "segments"
        assert report["batch"] * report["seq_length"] == 16384


def test_pictures(llama_8b: Path, tmp_path: Path) -> None:
    plot, graph = tmp_path / "levels.png", tmp_path / "layer.svg"
    assert run(["compile", "--config", str(llama_8b), "--set", "use_dora=true", "--plot", str(plot), "--graph", str(graph)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in graph.read_text()


@pytest.mark.parametrize(
    ("args", "named"), [(["--set", "rank"], "NAME=VALUE"), (["--set", "rank=8"], "rank"), (["--save-level", "P9"], "save_level")]
)
def test_bad_settings_are_named(llama_8b: Path, args: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "--config", str(llama_8b), *args]) == 2
    assert named in capsys.readouterr().err
