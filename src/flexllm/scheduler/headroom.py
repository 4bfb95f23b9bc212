"""What finetuning leaves unused for requests that are not here yet, learnt from those that came.

A deadline can be met with nothing to spare, and is missed when a prompt arrives a moment later. How much to spare depends on
the prompts and on how close to its objectives the server is without any finetuning, so both are measured as it runs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

MEMORY = 64  # first tokens, or bursts of prompts, that are remembered
LATE_SHARE = 0.05  # of first tokens: the spare time of the latest of them is what counts
BURST_QUANTILE = 0.98  # of the time by which bursts of prompts put running requests back
FORGOTTEN = 60.0  # seconds after which a first token says nothing about now
WAIT_SHARE = 0.25  # of that spare time may be spent on finetuning before a newcomer is looked at
LEAST_WAIT_SHARE = 0.05  # of the configured wait remains when nothing is to spare


class FirstTokens:
    """The first tokens of a class of requests: how long before their deadline they came."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # (when, seconds to spare; negative: late)
        self._ordered: list[float] = []  # the seconds

    def add(self, now: float, spare: float) -> None:
        if len(self._recent) == MEMORY:
            self._forget()
        self._recent.append((now, spare))
        insort(self._ordered, spare)

    def spare(self, now: float) -> float:
        """Seconds that all but the latest few had to spare; inf when there was none lately."""
        while self._recent and self._recent[0][0] < now - FORGOTTEN:
            self._forget()
        return self._ordered[int(LATE_SHARE * len(self._ordered))] if self._ordered else math.inf

    def _forget(self) -> None:
        _, spare = self._recent.popleft()
        del self._ordered[bisect_left(self._ordered, spare)]


def newcomer_wait(configured: float, spare: float) -> float:
    """Seconds of finetuning that a newcomer may find under way: as configured, unless first tokens come close to their deadline."""
    return min(configured, max(WAIT_SHARE * spare, LEAST_WAIT_SHARE * configured))


class PromptBursts:
    """How far prompts put the running requests back: iterations in a row that prefill take longer than the pace allows."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=MEMORY)  # seconds, one per burst
        self._current: float | None = None  # seconds so far of the burst under way
        self.reserve = 0.0  # seconds to be ahead of every deadline before finetuning gets the rest

    def iteration(self, seconds: float, pace: float) -> None:
        """An iteration with prefill rows took `seconds` for its inference rows, where running requests want a token every `pace`."""
        self._current = (self._current or 0.0) + seconds - pace

    def end(self) -> None:
        """An iteration without prefill rows."""
        if self._current is None:
            return
        self._recent.append(max(0.0, self._current))
        self._current = None
        ordered = sorted(self._recent)
        self.reserve = ordered[int(BURST_QUANTILE * (len(ordered) - 1))]
