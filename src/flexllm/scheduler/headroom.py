"""What finetuning leaves unused because the next iteration may turn out longer than planned, learnt from those before it.

A deadline that is met with nothing to spare is missed when a prompt comes a moment later, or when the iteration takes longer than
predicted. How much to spare depends on the prompts and on the machine, so both are watched.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

MEMORY = 64  # setbacks of a kind that are remembered
QUANTILE = 0.98  # of them that the reserve covers


class Reserve:
    """Seconds by which running requests stay ahead of their deadlines before finetuning gets the rest.

    Time in hand is built up once per request and kept, so a second costs finetuning a second per request, not per token.
    """

    def __init__(self) -> None:
        self._bursts, self._overruns = _Recent(), _Recent()
        self._burst: float | None = None  # seconds so far of the burst of prompts under way

    @property
    def seconds(self) -> float:
        return max(self._bursts.quantile, self._overruns.quantile)

    def prompts(self, seconds: float, pace: float) -> None:
        """An iteration with prefill rows: its inference rows take `seconds`, running requests want a token every `pace`."""
        self._burst = (self._burst or 0.0) + seconds - pace

    def no_prompts(self) -> None:
        """An iteration without: a burst of prompts, if there was one, is over."""
        if self._burst is not None:
            self._bursts.add(max(0.0, self._burst))
            self._burst = None

    def overrun(self, seconds: float) -> None:
        """An iteration with finetuning took so much longer than predicted (negative: less)."""
        self._overruns.add(max(0.0, seconds))


class _Recent:
    """The last MEMORY numbers, and the QUANTILE of them; 0 before there are any."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, value: float) -> None:
        if len(self._values) == MEMORY:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]
        self._values.append(value)
        insort(self._ordered, value)

    @property
    def quantile(self) -> float:
        return self._ordered[int(QUANTILE * (len(self._ordered) - 1))] if self._ordered else 0.0
