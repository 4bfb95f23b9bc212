"""What is asked of a server, and when: recorded traces and synthetic arrivals.

The loop is open: each request comes at its time whether or not earlier ones are done. Times are seconds from the start.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from flexllm.core import INTERACTIVE


@dataclass(frozen=True, slots=True)
class Arrival:
    time: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    priority: str = INTERACTIVE  # the SLO class


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

    `.csv` files have the columns arrival_s, prompt_tokens, output_tokens and perhaps adapter, or those of the Azure LLM inference
    traces (TIMESTAMP, ContextTokens, GeneratedTokens); `.jsonl` files have timestamp (milliseconds), input_length, output_length
    (Mooncake). Raises OSError for a file that cannot be read, ValueError for one that is no trace.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"a trace must be a .csv or .jsonl file, got {str(path)!r}")
    try:
        with path.open(newline="") as file:
            found = map(_csv_row, csv.DictReader(file)) if path.suffix == ".csv" else map(_jsonl_row, filter(str.strip, file))
            arrivals = sorted(found, key=lambda arrival: arrival.time)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace: {type(error).__name__} {error}") from error
    if not arrivals:
        raise ValueError(f"{path} is an empty trace")
    if not all(math.isfinite(a.time) and a.prompt_tokens > 0 and a.output_tokens > 0 for a in arrivals):
        raise ValueError(f"{path} is not a trace: times must be finite and lengths positive")
    first = arrivals[0].time
    return [replace(a, time=a.time - first) for a in arrivals]


def _csv_row(row: Mapping[str, str]) -> Arrival:
    if "TIMESTAMP" in row:
        time = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
        return Arrival(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    return Arrival(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]), row.get("adapter") or None)


def _jsonl_row(line: str) -> Arrival:
    row = json.loads(line)
    return Arrival(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]))


def window(arrivals: Iterable[Arrival], start: float, duration: float) -> list[Arrival]:
    """The arrivals in [start, start + duration), with times counted from `start`."""
    return [replace(a, time=a.time - start) for a in arrivals if start <= a.time < start + duration]


def scaled(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same arrivals at `rate` per second on average, by stretching time; thinning at random would destroy the bursts."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate!r}")
    span = max((a.time for a in arrivals), default=0.0)
    factor = len(arrivals) / rate / span if span else 1.0
    return [replace(a, time=a.time * factor) for a in arrivals]


def scaled_lengths(arrivals: Iterable[Arrival], factor: float, max_prompt: int, max_output: int) -> list[Arrival]:
    """Multiply lengths by `factor` and cap them, so that a trace fits a small model's context."""

    def scale(tokens: int, most: int) -> int:
        return min(most, max(1, round(tokens * factor)))

    return [
        replace(a, prompt_tokens=scale(a.prompt_tokens, max_prompt), output_tokens=scale(a.output_tokens, max_output)) for a in arrivals
    ]
