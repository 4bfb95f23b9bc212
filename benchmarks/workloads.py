"""What is asked of a server, and when: synthetic arrivals, recorded traces, and prompts of a given length.

An open loop sends each request at its arrival time whether or not earlier ones are done. Times are seconds from the start.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

FIRST_ORDINARY_TOKEN = 1000  # below it live special tokens and single bytes in the vocabularies we use


@dataclass(frozen=True, slots=True)
class Arrival:
    time: float
    prompt_tokens: int
    output_tokens: int


def gamma_arrivals(
    rate: float, duration: float, prompt_tokens: int, output_tokens: int, *, cv: float = 1.0, length_cv: float = 0.0, seed: int = 0
) -> list[Arrival]:
    """Arrivals at `rate` per second on average, with Gamma gaps of coefficient of variation `cv` (1 is Poisson, more is bursty).

    Lengths are log-normal with the given means and coefficient of variation `length_cv` (0: fixed). Raises ValueError when
    a rate, duration, length or `cv` is not positive.
    """
    for name, value in (
        ("rate", rate),
        ("duration", duration),
        ("prompt_tokens", prompt_tokens),
        ("output_tokens", output_tokens),
        ("cv", cv),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    rng = random.Random(seed)
    shape = 1.0 / cv**2
    arrivals = []
    now = rng.gammavariate(shape, 1.0 / (rate * shape))
    while now < duration:
        arrivals.append(Arrival(now, _length(rng, prompt_tokens, length_cv), _length(rng, output_tokens, length_cv)))
        now += rng.gammavariate(shape, 1.0 / (rate * shape))
    return arrivals


def poisson_arrivals(
    rate: float, duration: float, prompt_tokens: int, output_tokens: int, *, length_cv: float = 0.0, seed: int = 0
) -> list[Arrival]:
    return gamma_arrivals(rate, duration, prompt_tokens, output_tokens, length_cv=length_cv, seed=seed)


def _length(rng: random.Random, mean: int, cv: float) -> int:
    if cv == 0:
        return mean
    variance = math.log1p(cv**2)
    return max(1, round(rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))))


def load_trace(path: Path) -> list[Arrival]:
    """Arrivals of a recorded trace, in order of time.

    `.csv` files have the columns arrival_s, prompt_tokens, output_tokens (Azure 2023, ServeGen); `.jsonl` files have
    timestamp (milliseconds), input_length, output_length (Mooncake). Raises ValueError for any other suffix.
    """
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [Arrival(float(r["arrival_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines() if line]
        rows = [Arrival(r["timestamp"] / 1000, int(r["input_length"]), int(r["output_length"])) for r in records]
    else:
        raise ValueError(f"a trace must be a .csv or .jsonl file, got {str(path)!r}")
    return sorted(rows, key=lambda arrival: arrival.time)


def window(arrivals: Iterable[Arrival], start: float, duration: float) -> list[Arrival]:
    """The arrivals in [start, start + duration), with times counted from `start`."""
    return [replace(a, time=a.time - start) for a in arrivals if start <= a.time < start + duration]


def stretch(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """Slow a trace down by stretching time; thinning it at random would destroy its bursts."""
    if factor <= 0:
        raise ValueError(f"factor must be positive, got {factor!r}")
    return [replace(a, time=a.time * factor) for a in arrivals]


def scale_lengths(arrivals: Iterable[Arrival], factor: float, max_prompt: int, max_output: int) -> list[Arrival]:
    """Multiply lengths by `factor` and cap them, so that a trace fits a small model's context."""
    return [
        replace(
            a,
            prompt_tokens=min(max_prompt, max(1, round(a.prompt_tokens * factor))),
            output_tokens=min(max_output, max(1, round(a.output_tokens * factor))),
        )
        for a in arrivals
    ]


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ordinary token ids: no two share a prefix, so no server's prefix cache can help."""
    rng = random.Random(seed)
    return [rng.choices(range(min(FIRST_ORDINARY_TOKEN, vocab_size // 2), vocab_size), k=n) for n in lengths]


def training_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Made-up prose: sentences of pronounceable words, so that a tokenizer sees ordinary letters."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(500)]
    return [" ".join(rng.choices(vocabulary, k=words)).capitalize() + "." for _ in range(count)]
