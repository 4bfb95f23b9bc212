"""What finetuning leaves unused for requests that are not here yet, learnt from those that came.

A deadline can be met with nothing to spare, and is missed when a prompt comes a moment later. How much to spare depends on the
prompts, so they are watched.
"""

from __future__ import annotations

from collections import deque

MEMORY = 64  # bursts of prompts that are remembered
QUANTILE = 0.98  # of the time by which they put running requests back


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
        self.reserve = ordered[int(QUANTILE * (len(ordered) - 1))]
