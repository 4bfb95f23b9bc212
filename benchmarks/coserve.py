"""Co-serving: requests under an SLO while a LoRA job trains in what they leave over, against each of the two alone.

One server, three phases that take turns: requests alone, the job alone (its dedicated speed), both. The load is open loop,
Poisson at a fixed rate (or bursty with --cv). The objectives are those of --slo with TPOT scaled by h, the decode step at
batch 8 measured here over 13 ms (the same on an A100 for an 8B model). With --vllm-python the same load also meets a
machine split in two: vLLM on half of the cores, PEFT training on the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from client import LoadGenerator, RequestRecord, raw, summarize
from common import finish, log, parser
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model
from flexllm.simulate.workload import Arrival, gamma_arrivals
from processes import Peer, Server, flexllm_server, vllm_server
from workloads import random_prompts, training_texts

SLOS = {"loose": (5.0, 0.045), "mid": (0.4, 0.120), "strict": (0.5, 0.050)}  # TTFT s, TPOT s on the reference machine
REFERENCE_STEP = 0.013  # seconds of a decode step at batch 8, 8B model on an A100
SETTLE = 2.0  # seconds between two phases
RAMP = 0.1  # of a phase: the counters start when the load is up
LORA_RANK = 16
TEXT_WORDS = 110  # about 256 tokens


@dataclass(frozen=True)
class Load:
    arrivals: list[Arrival]
    prompts: list[list[int]]
    seconds: float


@dataclass(frozen=True)
class Phase:
    records: list[RequestRecord]
    finetune_tok_s: float  # tokens whose backward is done
    busy: float  # share of the time that the engine spent in iterations


@dataclass(frozen=True)
class Counters:
    time: float
    finetune_tokens: float
    step_seconds: float

    @staticmethod
    def read(server: Server) -> Counters:
        tokens = seconds = 0.0
        for family in text_string_to_metric_families(httpx.get(f"{server.base_url}/metrics", timeout=30).text):
            for sample in family.samples:
                if sample.name == "flexllm:finetune_tokens_total" and sample.labels.get("phase") == "backward":
                    tokens += sample.value
                elif sample.name == "flexllm:step_seconds_sum":
                    seconds += sample.value
        return Counters(time.perf_counter(), tokens, seconds)


class Job:
    """A LoRA job on our server that outlasts the benchmark; paused but in the phases that want it."""

    def __init__(self, server: Server, seed: int, folder: Path) -> None:
        self._client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120)
        path = folder / "train.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts(200, TEXT_WORDS, seed)))
        with path.open("rb") as file:
            uploaded = self._client.files.create(file=file, purpose="fine-tune")
        self._client.files.wait_for_processing(uploaded.id)
        peft = {"type": "lora", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}
        hyperparameters: Any = {"n_epochs": 50, "batch_size": 1}
        self._id = self._client.fine_tuning.jobs.create(
            model=server.model,
            training_file=uploaded.id,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            extra_body={"peft": peft},
        ).id
        self._wait_for("running")
        self._client.fine_tuning.jobs.pause(self._id)
        self._wait_for("paused")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._client.fine_tuning.jobs.resume(self._id)
        self._wait_for("running")
        time.sleep(SETTLE)
        try:
            yield
        finally:
            self._client.fine_tuning.jobs.pause(self._id)
            self._wait_for("paused")

    def _wait_for(self, status: str, patience: float = 120.0) -> None:
        deadline = time.monotonic() + patience
        while (found := self._client.fine_tuning.jobs.retrieve(self._id)).status != status:
            if found.status in ("failed", "cancelled", "succeeded") or time.monotonic() > deadline:
                raise RuntimeError(f"the job is {found.status}, not {status}: {found.error}")
            time.sleep(0.1)


async def offer(server: Server, load: Load) -> list[RequestRecord]:
    async with LoadGenerator(server.base_url, server.model) as generator:
        return await generator.open_loop(load.arrivals, load.prompts)


def run_phase(server: Server, load: Load | None, seconds: float) -> Phase:
    """Offer the load (or none) and count from when it is up until its last arrival; the answers are then waited for."""

    async def phase() -> tuple[list[RequestRecord], Counters, Counters]:
        requests = asyncio.create_task(offer(server, load)) if load else None
        await asyncio.sleep(RAMP * seconds)
        before = await asyncio.to_thread(Counters.read, server)
        await asyncio.sleep((1 - RAMP) * seconds)
        after = await asyncio.to_thread(Counters.read, server)
        return (await requests if requests else []), before, after

    records, before, after = asyncio.run(phase())
    elapsed = after.time - before.time
    return Phase(
        records,
        (after.finetune_tokens - before.finetune_tokens) / elapsed,
        min(1.0, (after.step_seconds - before.step_seconds) / elapsed),
    )


def decode_step_seconds(server: Server, vocab_size: int, seed: int) -> float:
    """A decode step at batch 8: the median TPOT of eight concurrent requests with short prompts."""

    async def probe() -> list[RequestRecord]:
        async with LoadGenerator(server.base_url, server.model) as generator:
            await generator.closed_loop(random_prompts([16] * 8, vocab_size, seed), 8, concurrency=8)
            return await generator.closed_loop(random_prompts([16] * 8, vocab_size, seed + 1), 48, concurrency=8)

    return statistics.median(r.tpot for r in asyncio.run(probe()))


def split_machine(args: argparse.Namespace, model: Path, load: Load, slo: tuple[float, float], vocab: int, folder: Path) -> dict[str, Any]:
    """vLLM on the first half of the cores, PEFT training on the rest, each with its cores to itself."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    if len(cores) < 2:
        raise RuntimeError("a machine with one core cannot be split")
    step_seconds: list[float] = []
    ids = random_prompts([257], vocab, args.seed)[0]
    done = threading.Event()
    with (
        vllm_server(args.vllm_python, model, folder / "vllm.log", cores[:half]) as server,
        Peer("hf_peft.py", "--model", str(model), threads=len(cores) - half, cores=cores[half:]) as peer,
    ):

        def train() -> None:
            while not done.is_set():
                step_seconds.append(peer.ask(ids=ids, checkpointing=False, count=False)["seconds"])

        asyncio.run(offer(server, Load(load.arrivals[:4], load.prompts[:4], load.seconds)))
        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            records = asyncio.run(offer(server, load))
        finally:
            done.set()
            trainer.join()
    rate = (len(ids) - 1) / statistics.median(step_seconds)
    return {"finetune_tok_s": rate, **summarize(records, *slo), "records": raw(records)}


def measure(server: Server, load: Load, rounds: int, seed: int, folder: Path) -> dict[str, list[Phase]]:
    """The three phases in turns, `rounds` times."""
    phases: dict[str, list[Phase]] = {"inference": [], "finetune": [], "coserve": []}
    job = Job(server, seed, folder)
    for turn in range(rounds):
        for name, found in phases.items():
            offered = None if name == "finetune" else load
            with job.running() if name != "inference" else contextlib.nullcontext():
                found.append(run_phase(server, offered, load.seconds))
            last = found[-1]
            log(f"round {turn + 1}, {name}: {last.finetune_tok_s:.0f} finetuning tok/s, busy {last.busy:.0%}")
            time.sleep(SETTLE)
    return phases


def figures(phases: dict[str, list[Phase]], slo: tuple[float, float]) -> dict[str, Any]:
    alone = summarize([r for p in phases["inference"] for r in p.records], *slo)
    both = summarize([r for p in phases["coserve"] for r in p.records], *slo)
    rates = {name: [p.finetune_tok_s for p in found] for name, found in phases.items()}
    idle = [1 - p.busy for p in phases["inference"]]
    shares = [c / d for c, d in zip(rates["coserve"], rates["finetune"], strict=True)]
    efficiency = [share / free for share, free in zip(shares, idle, strict=True)]
    return {
        "attainment": both["attainment"],
        "attainment_inference_only": alone["attainment"],
        "finetune_tok_s": statistics.median(rates["coserve"]),
        "finetune_tok_s_dedicated": statistics.median(rates["finetune"]),
        "finetune_share": statistics.median(shares),
        "idle_share_inference_only": statistics.median(idle),
        "leftover_efficiency": statistics.median(efficiency),
        "p99_tpot_ms": both["p99_tpot_ms"],
        "p99_ttft_ms": both["p99_ttft_ms"],
        "max_gap_ms": both["max_gap_ms"],
        "coserve": both,
        "inference_only": alone,
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rate", type=float, default=0.8, help="requests per second")
    options.add_argument("--cv", type=float, default=1.0, help="burstiness: coefficient of variation of the gaps (1 is Poisson)")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--output-tokens", type=int, default=64)
    options.add_argument("--slo", choices=sorted(SLOS), default="loose")
    options.add_argument("--seconds", type=float, help="length of a phase (default: 60, or 15 with --quick)")
    options.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="also measure a split machine, with this vLLM")
    args = options.parse_args()
    seconds, rounds = args.seconds or (15.0 if args.quick else 60.0), 1 if args.quick else 3
    model = resolve_model(args.model)
    vocab = ModelConfig.from_hf(model).vocab_size
    arrivals = gamma_arrivals(args.rate, seconds, args.prompt_tokens, args.output_tokens, cv=args.cv, length_cv=0.5, seed=args.seed)
    load = Load(arrivals, random_prompts([a.prompt_tokens for a in arrivals], vocab, args.seed), seconds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = ["--state-dir", str(folder / "state"), "--dtype", "bfloat16"]
        with flexllm_server(model, folder / "probe.log", *flags, threads=args.threads) as server:
            step = decode_step_seconds(server, vocab, args.seed)
        h = step / REFERENCE_STEP
        ttft, tpot = SLOS[args.slo]
        slo = (ttft, tpot * h)
        log(f"decode step at batch 8: {1e3 * step:.1f} ms, h = {h:.2f}; objectives: TTFT {slo[0]:.1f} s, TPOT {1e3 * slo[1]:.0f} ms")
        flags += ["--slo-ttft", f"{slo[0]:.4f}", "--slo-tpot", f"{slo[1]:.4f}"]
        with flexllm_server(model, folder / "flexllm.log", *flags, threads=args.threads) as server:
            phases = measure(server, load, rounds, args.seed, folder)
        fields = figures(phases, slo)
        split = split_machine(args, model, load, slo, vocab, folder) if args.vllm_python else None
    fields |= {
        "speedup_vs_best_split": fields["finetune_tok_s"] / split["finetune_tok_s"] if split else None,
        "split": {k: v for k, v in split.items() if k != "records"} if split else None,
        "slo": {"name": args.slo, "ttft_s": slo[0], "tpot_s": slo[1], "h": h, "decode_step_ms": 1e3 * step},
        "load": {"rate": args.rate, "cv": args.cv, "requests": len(arrivals), "seconds": seconds, "rounds": rounds},
    }
    finish("coserve", args, fields, samples(phases, split))


def samples(phases: dict[str, list[Phase]], split: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: [{"finetune_tok_s": p.finetune_tok_s, "busy": p.busy, "requests": raw(p.records)} for p in rounds]
        for name, rounds in phases.items()
    }
    return {**found, "split": split["records"]} if split else found


if __name__ == "__main__":
    main()
