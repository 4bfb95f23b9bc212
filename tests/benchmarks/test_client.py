"""The load generator against a server that streams a token every few milliseconds, or never answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx

from client import LoadGenerator
from flexllm.simulate.workload import Arrival

SILENT = 7  # a prompt of so many tokens is never answered


async def answer(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(3600 if len(body["prompt"]) == SILENT else 0)
        for _ in range(body["max_tokens"]):
            yield b"data: " + json.dumps({"choices": [{"text": "a"}]}).encode() + b"\n\n"
            await asyncio.sleep(0.002)
        yield b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}).encode() + b"\n\n"

    return httpx.Response(200, content=events())


def generator() -> LoadGenerator:
    found = LoadGenerator("http://test", "bench")
    found._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")
    return found


def test_open_loop_waits_for_every_answer() -> None:
    async def run() -> None:
        async with generator() as load:
            records = await load.open_loop([Arrival(0.02, 3, 5), Arrival(0.0, 4, 9)], [[1] * 3, [1] * 4])
        assert [(r.due, r.prompt_tokens, r.output_tokens, r.cut, r.error) for r in records] == [
            (0.02, 3, 5, False, None),
            (0.0, 4, 9, False, None),
        ]
        assert all(r.ttft >= 0 and len(r.token_times) == r.output_tokens for r in records)

    asyncio.run(run())


def test_what_is_not_answered_in_time_has_failed() -> None:
    async def run() -> None:
        arrivals = [Arrival(0.0, 3, 10**6), Arrival(0.0, SILENT, 5), Arrival(0.0, 4, 3)]
        async with generator() as load:
            records = await load.open_loop(arrivals, [[1] * a.prompt_tokens for a in arrivals], until=0.3)
        endless, silent, short = records
        for record in (endless, silent):
            assert record.cut
            assert "not answered" in (record.error or "")
            assert not record.attains(10.0, 10.0)
        assert len(endless.token_times) > 0
        assert (short.cut, short.error, short.output_tokens) == (False, None, 3)

    asyncio.run(run())


def test_closed_loop_ends_with_its_prompts_or_its_time() -> None:
    async def run() -> None:
        async with generator() as load:
            done = await load.closed_loop([[1]] * 5, [2, 3, 4, 5, 6], concurrency=2)
            cut = await load.closed_loop([[1]] * 5, [10**6] * 5, concurrency=2, seconds=0.2)
        assert [r.output_tokens for r in done] == [2, 3, 4, 5, 6]
        assert len(cut) == 2
        assert all(r.cut and r.error is None for r in cut)

    asyncio.run(run())
