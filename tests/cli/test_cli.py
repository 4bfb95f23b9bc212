"""What a user gets wrong is exit status 2 and one line on stderr; help costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexllm.cli.main import run

VERBS = ("serve", "generate", "chat", "finetune", "compile", "profile", "trace", "plan", "demo")


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must fail; returns what it says, without the prefix."""
    assert run(args) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("flexllm: error: ")
    return lines[0].removeprefix("flexllm: error: ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_verb_and_shows_a_command(verb: str, capsys: pytest.CaptureFixture[str]):
    assert run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: flexllm" in text
    assert f"flexllm {verb}" in text.split("Usage:")[1]


def test_help_and_version_load_neither_torch_nor_transformers():
    code = (
        "import sys; from flexllm.cli.main import run; assert run(['--help']) == 0 and run(['--version']) == 0;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'fastapi')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["nonsense"], "nonsense"),
        (["serve", "--nonsense"], "--nonsense"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--slo-tpot", "-1"], "tpot"),
        (["serve", "--flex-slo-ttft", "0"], "ttft"),
        (["serve", "--flex-slo-tpot", "0"], "tpot"),
        (["serve", "--mode", "fast"], "mode"),
        (["serve", "--kv-cache-gb", "0"], "kv-cache-gb"),
        (["serve", "--finetune-gb", "0"], "finetune-gb"),
        (["serve", "--temporal-steps", "-1"], "--temporal-steps"),
        (["serve", "--enable-adapter-loading"], "--adapter-dir"),
        (["generate", "--temperature", "-1", "-p", "a"], "temperature"),
        (["generate", "--file", "no-such-file"], "no-such-file"),
        (["chat", "--max-tokens", "0"], "max_tokens"),
        (["finetune", "default", "-o", "out"], "--data"),
        (["finetune", "default", "--data", "no-such-file", "-o", "out"], "no-such-file"),
        (["finetune", "default", "--data", __file__, "-o", "out", "--r", "0"], "r must be"),
        (["finetune", "default", "--data", __file__, "-o", "out", "--target-modules", "q_proj,nonsense"], "target_modules"),
        (["finetune", "default", "--data", __file__, "-o", "out", "--learning-rate", "nan"], "learning_rate"),
        (["compile", "--peft", "magic"], "magic"),
        (["plan", "--model", "config.json"], "--trace"),
        (["plan", "--trace", "no-such-file.csv", "--model", "no-such-folder"], "no-such-folder"),
        (["plan", "--trace", "a.csv", "--model", "config.json", "--device", "abacus"], "abacus"),
        (["plan", "--trace", "a.csv", "--model", "config.json", "--slo-tpot", "-1"], "tpot"),
        (["compile", "--config", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_arguments_are_named(args: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert named in error_of(capsys, *args)


def test_an_unsupported_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    message = error_of(capsys, "compile", str(tmp_path))
    assert "mamba" in message.lower()
    assert "llama" in message.lower()
