"""`flexllm generate`: complete prompts offline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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


def generate(
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with one prompt per line.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message: use the model's chat template.")] = False,
    adapter: Adapter = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.")] = None,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt: prompt, text, finish_reason, tokens.")] = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Complete prompts, all in one continuous batch. Without --prompt and --file the prompt is read from stdin.

    \b
    flexllm generate -p "The capital of France is"
    flexllm generate default --chat -p "Name three rivers." --max-tokens 40
    flexllm generate ./my-model --adapter ./my-adapter -f prompts.txt --json > out.jsonl
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=tuple(stop or ()), seed=seed)
    prompts = _prompts(prompt or [], file)

    with load_llm(model, dtype=dtype, quantization=quantization, device=device, threads=threads, max_model_len=max_model_len) as llm:
        inputs = [llm.chat_prompt([{"role": "user", "content": p}]) for p in prompts] if chat else prompts
        completions = llm.generate(inputs, sampling, adapter=adapter)
    for text, completion in zip(prompts, completions, strict=True):
        if as_json:
            record = {
                "prompt": text,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": len(completion.token_ids),
            }
            typer.echo(json.dumps(record, ensure_ascii=False))
        else:
            if len(prompts) > 1:
                typer.echo(f">>> {text}")
            typer.echo(completion.text)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        prompts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts and file is None:
        prompts = [sys.stdin.read().rstrip("\n")]
    if not prompts or not all(prompts):
        raise ValueError("no prompt: give --prompt, --file or text on stdin")
    return prompts
