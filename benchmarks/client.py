"""A streaming load generator for any OpenAI-compatible server: open loop (arrival times) or closed loop (fixed concurrency).

Prompts are token ids for `POST /v1/completions`, output lengths are forced (`ignore_eos`), decoding is greedy. TTFT is
counted from the time a request was due, so that a generator running late cannot flatter the server. Either loop can be closed
at a time: what is still streaming then is cut, and no failure.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import httpx

from flexllm.simulate.workload import Arrival

TIMEOUT = httpx.Timeout(600.0)
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=256)


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it; times in seconds from the start of the run."""

    due: float
    prompt_tokens: int
    output_tokens: int = 0  # as the server's usage says
    first: float | None = None
    last: float | None = None
    max_gap: float = 0.0  # the longest wait between two chunks
    gaps: list[float] = field(default_factory=list, repr=False)
    error: str | None = None
    cut: bool = False  # by us, with `output_tokens` of those it was to have

    @property
    def ok(self) -> bool:
        return self.error is None and self.first is not None

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds per output token after the first; 0 for a single token."""
        assert self.first is not None
        assert self.last is not None
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def token_times(self) -> list[float]:
        """When each chunk came; a server sends one per token."""
        return [] if self.first is None else list(accumulate(self.gaps, initial=self.first))

    def attains(self, ttft: float, tpot: float) -> bool:
        return self.ok and self.ttft <= ttft and self.tpot <= tpot


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the tasks; that some were cancelled is no error."""
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


def _cut(record: RequestRecord, error: str | None = None) -> None:
    record.cut = True
    record.error = record.error or error
    record.output_tokens = len(record.token_times)


class LoadGenerator:
    """Sends prompts to one server. Use as an async context manager."""

    def __init__(self, base_url: str, model: str) -> None:
        self._model = model
        self._client = httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT, limits=LIMITS)
        self._start = 0.0

    async def __aenter__(self) -> LoadGenerator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def open_loop(
        self, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]], until: float | None = None
    ) -> list[RequestRecord]:
        """Send each prompt at its arrival time and wait for all answers; what is not answered `until` so many seconds after the start has
        failed. Records are in the order of arrival."""
        self._start = time.perf_counter()
        records = [RequestRecord(a.time, len(p)) for a, p in zip(arrivals, prompts, strict=True)]

        async def one(arrival: Arrival, prompt: Sequence[int], record: RequestRecord) -> None:
            await asyncio.sleep(arrival.time - self._now())
            await self._stream(prompt, arrival.output_tokens, record)

        tasks = [asyncio.create_task(one(*each)) for each in zip(arrivals, prompts, records, strict=True)]
        if tasks and until is not None:
            await asyncio.wait(tasks, timeout=max(0.0, until - self._now()))
            for task, record in zip(tasks, records, strict=True):
                if not task.done():
                    task.cancel()
                    _cut(record, f"not answered after {until:g} s")
        await _ended(tasks)
        return records

    async def closed_loop(
        self, prompts: Sequence[Sequence[int]], output_tokens: Sequence[int], concurrency: int, seconds: float | None = None
    ) -> list[RequestRecord]:
        """Keep `concurrency` requests in flight until every prompt is answered, or for `seconds`; those in flight are then cut."""
        self._start = time.perf_counter()
        waiting = iter(zip(prompts, output_tokens, strict=True))
        records: list[RequestRecord] = []

        async def worker() -> None:
            for prompt, tokens in waiting:
                record = RequestRecord(self._now(), len(prompt))
                records.append(record)
                try:
                    await self._stream(prompt, tokens, record)
                except asyncio.CancelledError:
                    _cut(record)
                    raise

        workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
        _, late = await asyncio.wait(workers, timeout=seconds)
        for task in late:
            task.cancel()
        await _ended(workers)
        return records

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _stream(self, prompt: Sequence[int], output_tokens: int, record: RequestRecord) -> None:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    record.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        self._note(record, json.loads(line[6:]))
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        if record.error is None and record.output_tokens != output_tokens:
            record.error = f"asked for {output_tokens} tokens, got {record.output_tokens}"

    def _note(self, record: RequestRecord, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            record.error = str(chunk["error"])
        if chunk.get("usage"):
            record.output_tokens = chunk["usage"]["completion_tokens"]
        if not chunk.get("choices"):
            return
        now = self._now()
        if record.last is None:
            record.first = now
        else:
            record.gaps.append(now - record.last)
            record.max_gap = max(record.max_gap, now - record.last)
        record.last = now


def percentile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1), linearly interpolated. Raises ValueError on no values."""
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def output_rate(records: Sequence[RequestRecord]) -> float:
    """Output tokens per second, from the first request due to the last token. Raises RuntimeError if any request failed."""
    failed = [r.error for r in records if not r.ok]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} requests failed, the first with: {failed[0]}")
    seconds = max(r.last for r in records if r.last is not None) - min(r.due for r in records)
    return sum(r.output_tokens for r in records) / seconds


def summarize(records: Sequence[RequestRecord], ttft: float, tpot: float) -> dict[str, Any]:
    """What a run of requests amounts to under the objectives `ttft` and `tpot` (seconds); a failed request attains nothing.
    None stands for what there is not without requests, or good ones."""
    good = [r for r in records if r.ok]
    gaps = [gap for r in good for gap in r.gaps]
    attained = [r for r in good if r.attains(ttft, tpot)]
    span = max(r.last for r in good if r.last is not None) - min(r.due for r in good) if good else 0.0
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "attainment": len(attained) / len(records) if records else None,
        "goodput_req_s": len(attained) / span if span else 0.0,
        "output_tok_s": sum(r.output_tokens for r in good) / span if span else 0.0,
        **{f"{q}_ttft_ms": v for q, v in quantiles_ms([r.ttft for r in good]).items()},
        **{f"{q}_tpot_ms": v for q, v in quantiles_ms([r.tpot for r in good]).items()},
        "p99_gap_ms": 1e3 * percentile(gaps, 0.99) if gaps else None,
        "max_gap_ms": 1e3 * max(gaps) if gaps else None,
    }


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{round(q * 100)}": 1e3 * percentile(seconds, q) if seconds else None for q in (0.5, 0.99)}


def raw(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """The records as plain data for a result file (single gaps left out: they are as many as tokens)."""
    return [{k: v for k, v in asdict(r).items() if k != "gaps"} for r in records]
