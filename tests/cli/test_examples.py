"""The examples run, and the README's Python is Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_offline_example(tiny_llama: Path, tmp_path: Path):
    command = [sys.executable, ROOT / "examples" / "offline.py", "--model", tiny_llama, "--epochs", "1", "--output", tmp_path / "adapter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stdout
    assert "finetuned:" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_finetune_writes_an_adapter_and_a_log(tiny_llama: Path, tmp_path: Path):
    data = ROOT / "examples" / "data"
    command = [sys.executable, "-m", "flexllm.cli.main", "finetune", tiny_llama, "--data", data / "train.jsonl", "-o", tmp_path / "adapter"]
    command += ["--max-steps", "3", "--log-json", tmp_path / "log.jsonl", "--r", "4", "--target-modules", "q_proj,v_proj"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 steps, loss ")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all(f'"{name}"' in lines[0] for name in ("step", "loss", "tokens", "labels", "grad_norm", "learning_rate"))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))
def test_readme_blocks_compile(block: str):
    compile(block, "README.md", "exec")
