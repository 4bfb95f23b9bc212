"""The engine runs where only torch, numpy, transformers, tokenizers and safetensors are installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABSENT = ["fastapi", "uvicorn", "msgspec", "zmq", "typer", "prometheus_client", "gguf", "peft", "openai"]
CHECK = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it is an ImportError
import flexllm.engine, flexllm.llm
"""


def test_the_engine_needs_no_web_or_wire_library() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "modules",
    [
        "flexllm.scheduler.scheduler, flexllm.memory.budget, flexllm.simulate.capacity, flexllm.simulate.roofline",
        "flexllm.server.main",  # it answers at once; what the tokenizer brings with it is imported behind that
    ],
)
def test_needs_neither_torch_nor_transformers(modules: str) -> None:
    check = f"import sys; import {modules}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
