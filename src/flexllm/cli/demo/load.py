"""Open-loop chat load: requests come when a Poisson process says so, whether or not earlier ones were answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexllm.config import SLO

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROMPTS = (
    "Give me three tips for a good night's sleep.",
    "Explain what a hash table is in simple words.",
    "Write two sentences about the sea in winter.",
    "What is the difference between weather and climate?",
    "Suggest a name for a small bakery and say why.",
    "How do plants make sugar from light?",
    "Write a short thank-you note to a neighbour.",
    "List four things to pack for a mountain hike.",
    "Why do we have leap years?",
    "Describe a quiet train station at night.",
    "What should I check before buying a used bicycle?",
    "Tell me a fact about octopuses.",
    "How does a refrigerator keep food cold?",
    "Write a haiku about rain on a tin roof.",
    "What makes bread rise?",
    "Give me an idea for a rainy Sunday with children.",
)
BUSY = 0.5  # share of its time that the server would need if it answered the requests one at a time, and did nothing else
PROBES = 3  # answers that say how fast the machine is


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request, as its client saw it. Times in seconds."""

    ttft: float
    tpot: float  # mean time per output token after the first; 0 with a single token
    tokens: int

    def attains(self, slo: SLO) -> bool:
        return self.ttft <= slo.ttft and self.tpot <= slo.tpot


@dataclass(slots=True)
class LoadStats:
    sent: int = 0
    failed: int = 0
    samples: list[Sample] = field(default_factory=list)

    def count(self, answer: Sample | None) -> None:
        """An answer, or None for a request that failed."""
        if answer is None:
            self.failed += 1
        else:
            self.samples.append(answer)

    def attainment(self, slo: SLO) -> float:
        """Share of the requests that met both objectives; a failed one met neither."""
        ended = len(self.samples) + self.failed
        return sum(s.attains(slo) for s in self.samples) / ended if ended else 1.0


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest-rank percentile, q in [0, 1]; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


async def rate_for(client: AsyncOpenAI, model: str, max_tokens: int) -> float:
    """Requests per second that keep this machine busy for BUSY of its time. RuntimeError if the server answers none."""
    # As many tokens as the load's answers have on average.
    answers = [await _ask(client, model, prompt, 3 * max_tokens // 4) for prompt in PROMPTS[:PROBES]]
    seconds = [a.ttft + a.tpot * (a.tokens - 1) for a in answers if a is not None]
    if not seconds:
        raise RuntimeError("the server answers no chat request")
    return BUSY / min(seconds)  # the first answer is slower than those to come, and so is one while something else runs


async def run_load(
    client: AsyncOpenAI, model: str, rate: float, max_tokens: int, stats: LoadStats, stop: asyncio.Event, seed: int = 0
) -> None:
    """Send `rate` streaming chat requests per second until `stop`, then wait for the last answers; `stats` fills as they end."""

    async def request(prompt: str, tokens: int) -> None:
        stats.sent += 1
        stats.count(await _ask(client, model, prompt, tokens))

    rng = random.Random(seed)
    async with asyncio.TaskGroup() as group:
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), rng.expovariate(rate))
            except TimeoutError:  # the next arrival
                group.create_task(request(rng.choice(PROMPTS), rng.randint(max_tokens // 2, max_tokens)))


async def _ask(client: AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> Sample | None:
    """One streamed answer of so many tokens; None if it failed."""
    from openai import OpenAIError

    begin = time.perf_counter()
    first = last = 0.0
    tokens = 0
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0.7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices:
                last = time.perf_counter()
                if chunk.choices[0].delta.content:
                    first = first or last
    except OpenAIError:
        return None
    if tokens == 0 or first == 0.0:
        return None
    return Sample(first - begin, (last - first) / (tokens - 1) if tokens > 1 else 0.0, tokens)
