"""A streaming load generator for any OpenAI-compatible server: open loop (arrival times) or closed loop (fixed concurrency).

Prompts are token ids for `POST /v1/completions`, output lengths are forced (`ignore_eos`), decoding is greedy. TTFT is
counted from the time a request was due, so that a generator running late cannot flatter the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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

    def attains(self, ttft: float, tpot: float) -> bool:
        return self.ok and self.ttft <= ttft and self.tpot <= tpot


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

    async def open_loop(self, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[RequestRecord]:
        """Send each prompt at its arrival time and wait for all answers; records are in the order of arrival."""
        self._start = time.perf_counter()

        async def one(arrival: Arrival, prompt: Sequence[int]) -> RequestRecord:
            await asyncio.sleep(arrival.time - self._now())
            return await self._stream(prompt, arrival.output_tokens, due=arrival.time)

        return list(await asyncio.gather(*(one(a, p) for a, p in zip(arrivals, prompts, strict=True))))

    async def closed_loop(self, prompts: Sequence[Sequence[int]], output_tokens: int, concurrency: int) -> list[RequestRecord]:
        """Keep `concurrency` requests in flight until every prompt is answered."""
        self._start = time.perf_counter()
        waiting = iter(prompts)
        records: list[RequestRecord] = []

        async def worker() -> None:
            for prompt in waiting:
                records.append(await self._stream(prompt, output_tokens, due=self._now()))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return records

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _stream(self, prompt: Sequence[int], output_tokens: int, due: float) -> RequestRecord:
        record = RequestRecord(due=due, prompt_tokens=len(prompt))
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
                    return record
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        self._note(record, json.loads(line[6:]))
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        if record.error is None and record.output_tokens != output_tokens:
            record.error = f"asked for {output_tokens} tokens, got {record.output_tokens}"
        return record

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
    """What a run of requests amounts to under the objectives `ttft` and `tpot` (seconds); a failed request attains nothing."""
    good = [r for r in records if r.ok]
    if not good:
        raise RuntimeError(f"no request of {len(records)} succeeded" + (f": {records[0].error}" if records else ""))
    gaps = [gap for r in good for gap in r.gaps]
    span = max(r.last for r in good if r.last is not None) - min(r.due for r in good)
    attained = [r for r in good if r.attains(ttft, tpot)]
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "attainment": len(attained) / len(records),
        "ttft_attainment": sum(r.ttft <= ttft for r in good) / len(records),
        "tpot_attainment": sum(r.tpot <= tpot for r in good) / len(records),
        "goodput_req_s": len(attained) / span,
        "output_tok_s": sum(r.output_tokens for r in good) / span,
        **{f"{q}_ttft_ms": v for q, v in quantiles_ms([r.ttft for r in good]).items()},
        **{f"{q}_tpot_ms": v for q, v in quantiles_ms([r.tpot for r in good]).items()},
        "p99_gap_ms": 1e3 * percentile(gaps, 0.99) if gaps else 0.0,
        "max_gap_ms": 1e3 * max(gaps, default=0.0),
    }


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{round(q * 100)}": 1e3 * percentile(seconds, q) for q in (0.5, 0.99)}


def raw(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """The records as plain data for a result file (single gaps left out: they are as many as tokens)."""
    return [{k: v for k, v in asdict(r).items() if k != "gaps"} for r in records]
