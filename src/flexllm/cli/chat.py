"""`flexllm chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flexllm.cli.offline import load_llm
from flexllm.cli.options import (
    DEFAULT_MODEL,
    Adapter,
    Device,
    Dtype,
    MaxModelLen,
    MaxTokens,
    Model,
    Quantization,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from flexllm.core import SamplingParams


def chat(
    model: Model = DEFAULT_MODEL,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="System message; the model's template may have one of its own.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Talk to a model. /reset begins anew, an empty line or Ctrl-D ends; Ctrl-C cuts an answer short.

    \b
    flexllm chat
    flexllm chat default --adapter ./my-adapter --temperature 0
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)

    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with load_llm(model, dtype=dtype, quantization=quantization, device=device, threads=threads, max_model_len=max_model_len) as llm:
        while (line := _read_line()) is not None:
            if line == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for piece in llm.stream(llm.chat_prompt(messages), sampling, adapter=adapter):
                    answer += piece
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                pass
            typer.echo()
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """The user's next message; None at the end of input or for an empty line."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip() or None
    except EOFError:
        return None
