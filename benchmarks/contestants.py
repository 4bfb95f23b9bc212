"""Who takes part in coserve.py: this engine's server under various settings, or vLLM beside PEFT training. One is awake at a time."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from client import LoadGenerator, RequestRecord
from common import log
from grid import Phase
from jobs import start_job
from processes import HTTP, Peer, Server, awake
from workloads import Load, random_prompts

SETTLE = 0.6  # seconds between thawing and measuring: an iteration that was frozen ends, and is reported
PROBES = 3
ROW_PROBE = 512  # tokens of a prompt that says what a row costs; one iteration computes them
PATIENCE = 20.0  # seconds after the arrivals, for answers
CLEAN_SECONDS = 20.0
COMES_BACK_SECONDS = 60.0  # for an engine that died and is being restarted
WARM_SECONDS = 2.0  # of a job that begins: its backward is compiled, and the latency model learns from its first iterations
PEER_ROWS = 256  # of a training step of PEFT, about as many as our jobs' examples have


class Ours:
    """A server of this engine with a LoRA job that outlasts the benchmark; being frozen is its pause. The contestants differ in the
    scheduler's settings, which change while it runs: `{"mode": "inference"}` gives the job no time."""

    def __init__(self, server: Server, folder: Path, training_seed: int) -> None:
        self.server = server
        start_job(server, folder, training_seed)
        time.sleep(WARM_SECONDS)

    def set(self, settings: Mapping[str, Any]) -> None:
        """Of the server, awake. Raises httpx.HTTPStatusError when it refuses, RuntimeError if it does not live."""
        wait_until_up(self.server)
        HTTP.patch(f"{self.server.base_url}/scheduler", json=dict(settings)).raise_for_status()

    def run(self, settings: Mapping[str, Any], load: Load) -> Phase:
        """Offer the load, beginning without requests, and count until all is answered: whoever puts answers off pays for it."""

        async def phase() -> tuple[list[RequestRecord], Counters, Counters]:
            before = await asyncio.to_thread(Counters.read, self.server)
            records, _ = await asyncio.gather(offer(self.server, load), asyncio.sleep(load.seconds))
            return records, before, await asyncio.to_thread(Counters.read, self.server)

        with awake(self.server):
            self.set(settings)
            settle(self.server)
            records, before, after = asyncio.run(phase())
            wait_until_clean(self.server)
        elapsed = after.time - before.time
        tokens, busy = after.finetune_tokens - before.finetune_tokens, after.step_seconds - before.step_seconds
        return Phase(records, load.seconds, elapsed, tokens / elapsed, min(elapsed, busy))


class VllmBesidePeft:
    """vLLM, which was given its cores when it was started, and PEFT training on `cores` for as long as there are requests."""

    def __init__(self, server: Server, peer: Peer, cores: Sequence[int], vocab_size: int, seed: int) -> None:
        self.server = server
        self._peer, self._cores = peer, cores
        self._ids = random_prompts([PEER_ROWS + 1], vocab_size, seed)[0]

    def _train(self) -> float:
        return float(self._peer.ask(ids=self._ids, checkpointing=False, count=False, threads=len(self._cores))["seconds"])

    def run(self, load: Load) -> Phase:
        steps: list[float] = []
        done = threading.Event()

        def train() -> None:
            while not done.is_set():
                steps.append(self._train())

        trainer = threading.Thread(target=train)
        self._peer.pin(self._cores)
        with awake(self.server):
            settle(self.server)
            trainer.start()
            start = time.perf_counter()
            try:
                records = asyncio.run(offer(self.server, load))
                elapsed = max(load.seconds, time.perf_counter() - start)
            finally:
                done.set()
                trainer.join()
            wait_until_clean(self.server)
        if not steps:
            raise RuntimeError("PEFT has trained no step")
        return Phase(records, load.seconds, elapsed, PEER_ROWS * len(steps) / sum(steps), None)


async def offer(server: Server, load: Load) -> list[RequestRecord]:
    if not load.arrivals:
        return []
    async with LoadGenerator(server.base_url, server.model) as generator:
        return await generator.open_loop(load.arrivals, load.prompts, load.seconds + PATIENCE)


# ---------------------------------------------------------------------------------------------------- what a server says
def samples(server: Server) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every sample of /metrics."""
    text = HTTP.get(f"{server.base_url}/metrics").text
    return [(s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples]


@dataclass(frozen=True)
class Counters:
    time: float
    finetune_tokens: float  # half a token when it has gone forward, half when it has gone backward: iterations do one or the other
    step_seconds: float

    @staticmethod
    def read(server: Server) -> Counters:
        found = samples(server)
        tokens = sum(v for name, _, v in found if name == "flexllm:finetune_tokens_total") / 2
        return Counters(time.perf_counter(), tokens, sum(v for name, _, v in found if name == "flexllm:step_seconds_sum"))


def settle(server: Server) -> None:
    """What to do with a server that was just thawed, or was given other settings."""
    time.sleep(SETTLE)
    wait_until_up(server)


def wait_until_up(server: Server) -> None:
    """Raises RuntimeError if it does not live: its figures would be zeros."""
    deadline = time.monotonic() + COMES_BACK_SECONDS
    while (answer := HTTP.get(f"{server.base_url}/health")).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError(f"a server is not up: {answer.text}")
        log(f"waiting for a server: {answer.text}")
        time.sleep(5)


def wait_until_clean(server: Server) -> None:
    """Until no request is running or waiting, or CLEAN_SECONDS. Requests that were cut end a little after their client left."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while left := sum(v for name, _, v in samples(server) if name in ("vllm:num_requests_running", "vllm:num_requests_waiting")):
        if time.monotonic() > deadline:
            log(f"{left:g} requests are still there after {CLEAN_SECONDS:g} s")
            return
        time.sleep(0.1)


# ----------------------------------------------------------------------------------------------------- what a machine can
def decode_step_seconds(server: Server, vocab_size: int, seed: int) -> float:
    """A decode step at batch 8: the median TPOT of eight concurrent requests with short prompts, the least of PROBES times: objectives
    scaled by it would be lax for the whole run if something else used the machine just then."""

    async def probe() -> list[RequestRecord]:
        async with LoadGenerator(server.base_url, server.model) as generator:
            await generator.closed_loop(random_prompts([16] * 8, vocab_size, seed), [8] * 8, concurrency=8)
            return await generator.closed_loop(random_prompts([16] * 8, vocab_size, seed + 1), [48] * 8, concurrency=8)

    return min(statistics.median(r.tpot for r in asyncio.run(probe())) for _ in range(PROBES))


def row_seconds(server: Server, vocab_size: int, seed: int) -> float:
    """What a row costs at the least, as one of many: TTFT of a lone long prompt over its tokens, the least of PROBES."""

    async def probe() -> list[RequestRecord]:
        async with LoadGenerator(server.base_url, server.model) as generator:
            return await generator.closed_loop(random_prompts([ROW_PROBE] * PROBES, vocab_size, seed), [2] * PROBES, concurrency=1)

    return min(r.ttft for r in asyncio.run(probe())) / ROW_PROBE


def capacity(ours: Ours, load: Load, concurrency: int, warmup: float) -> float:
    """Requests per second without finetuning, of a closed loop over the seconds of the load after the first `warmup`.

    A request counts by the share of its tokens that came within that time, so that those in flight at either end do not go amiss.
    """

    async def probe() -> list[RequestRecord]:
        async with LoadGenerator(ours.server.base_url, ours.server.model) as generator:
            outputs = [a.output_tokens for a in load.arrivals]
            return await generator.closed_loop(load.prompts, outputs, concurrency, seconds=load.seconds)

    with awake(ours.server):
        ours.set({"mode": "inference"})
        settle(ours.server)
        records = asyncio.run(probe())
        wait_until_clean(ours.server)
    wanted = [a.output_tokens for a in load.arrivals]
    return completed(records, wanted, warmup, load.seconds) / (load.seconds - warmup)


def completed(records: Sequence[RequestRecord], output_tokens: Sequence[int], start: float, end: float) -> float:
    """How many requests' worth of tokens came in [start, end); `output_tokens` are what each was to have, in the order of records."""
    shares = (sum(start <= t < end for t in r.token_times) / n for r, n in zip(records, output_tokens, strict=False))
    return sum(shares)
