"""How long an iteration takes, and how much work fits into a given time.

    seconds = drift * (t0 + g(rows) + sum_i c_i * feature_i)

`g`, the cost of pushing rows through the GEMMs, is piecewise linear between powers of two and never falls; all
coefficients are non-negative, so more work is never predicted to be cheaper and the inverses can bisect. Coefficients
come from a profile (`fit`) and are refitted while the engine runs (`observe`); `drift` follows the machine as a whole.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from flexllm.core import PlanFeatures, Sequence, StepPlan, TokenWindow

VERSION = 3  # of a stored profile
EXACT = 1e-12  # relative error: there is nothing to learn from (a simulation without noise)
SEGMENTS = 15  # of g: [0, 1], [1, 2], [2, 4], ... [8192, inf)
SEGMENT_STARTS = tuple((1 << i) >> 1 for i in range(SEGMENTS))
MAX_BITS = 32  # of a number of rows
_SEGMENT_ROWS = np.diff(SEGMENT_STARTS, append=np.inf)  # that fit into each


LINEAR = PlanFeatures._fields[1:]  # all but `rows`
# A crude prior, good for nothing but starting: a small model on two CPU cores.
_DEFAULT = {
    "t0": 3e-3,
    "decode_rows": 5e-5,
    "decode_context": 2e-7,
    "prefill_pairs": 1e-8,
    "prefills": 1e-3,
    "sampled_rows": 3e-4,
    "label_rows": 5e-4,
    "windows": 2e-3,
    "backward_rows": 5e-5,
    "backward_pairs": 1e-9,
    "backward_slices": 1e-3,
    "optimizer_steps": 1e-2,
}
_DEFAULT_SLOPE = 1.5e-3  # seconds per forward row


def features_of(plan: StepPlan) -> PlanFeatures:
    decode_rows = decode_context = prefill_rows = prefill_pairs = prefills = sampled = 0
    for chunk in plan.inference:
        sampled += chunk.sample
        if chunk.is_decode:
            decode_rows += 1
            decode_context += chunk.end
        else:
            prefill_rows += chunk.rows
            prefill_pairs += chunk.pairs
            prefills += 1
    return PlanFeatures(
        rows=decode_rows + prefill_rows + sum(w.rows_left for w in plan.windows),
        decode_rows=decode_rows,
        decode_context=decode_context,
        prefill_pairs=prefill_pairs + sum(w.pairs_left for w in plan.windows),
        prefills=prefills,
        sampled_rows=sampled,
        label_rows=sum(expected_labels(w.sequence, w.rows) for w in plan.windows),
        windows=len(plan.windows),
        backward_rows=sum(s.cost for s in plan.backward),
        backward_pairs=sum(s.pairs for s in plan.backward),
        backward_slices=len(plan.backward),
        optimizer_steps=len(plan.optimizer_steps),
    )


def expected_labels(sequence: Sequence, rows: int) -> int:
    """Labels in a window of a sequence, as if they lay evenly (the scheduler sees no tokens); validation: every row."""
    if not sequence.train:
        return rows
    return -(-rows * sequence.job.label_counts[sequence.example] // sequence.length)


class LatencyModel:
    """See the module. Times in seconds; not thread-safe."""

    REFIT_EVERY = 8  # observations
    HALF_LIFE = 20  # of an observation's weight in a refit, in observations
    MEMORY = 4 * HALF_LIFE  # observations that a refit looks at
    RECENT = 5  # the drift follows the median of so many: one odd iteration (a page fault, a checkpoint) moves it nowhere
    DRIFT_RATE = 0.3  # share of the way to that median, in logarithms, per observation
    ERRORS = 64  # that the quantiles look at

    def __init__(self, coefficients: Mapping[str, float], slopes: Iterable[float]) -> None:
        """`coefficients`: "t0" and the names in LINEAR; `slopes`: seconds per row in each segment of g."""
        self._theta = np.array([coefficients["t0"], *slopes, *(coefficients[name] for name in LINEAR)], dtype=np.float64)
        if self._theta.shape != (1 + SEGMENTS + len(LINEAR),) or not np.all(np.isfinite(self._theta)) or self._theta.min() < 0:
            raise ValueError(f"a latency model needs {SEGMENTS} slopes and finite, non-negative coefficients, got {self._theta.tolist()}")
        self._drift = 1.0
        self._num_observed = 0
        self._vectors = np.empty((0, len(self._theta)))  # of the last MEMORY observations that a refit has seen, the latest last
        self._seconds_of = np.empty(0)  # what each took, without drift
        self._unseen: list[tuple[PlanFeatures, float]] = []  # since
        self._recent: deque[float] = deque(maxlen=self.RECENT)  # log(measured / prediction without drift)
        self._errors: deque[float] = deque(maxlen=self.ERRORS)  # measured / predicted - 1
        self._unpack()

    @classmethod
    def default(cls) -> LatencyModel:
        return cls(_DEFAULT, [_DEFAULT_SLOPE] * SEGMENTS)

    # ------------------------------------------------------------------------------------------------------ prediction
    def predict(self, features: PlanFeatures) -> float:
        return 0.0 if features.is_empty else self._seconds(features)

    def most_window_rows(self, base: PlanFeatures, window: TokenWindow, budget: float) -> int:
        """Largest n such that `base` and the first n rows of `window` take <= budget."""
        per_pair, _, _, per_label, per_window = self._linear[2:7]
        fixed = self._seconds(base) + self._drift * (per_window - self._curve(base.rows))
        sequence, start, left = window.sequence, window.start, window.left

        def cost(n: int) -> float:
            pairs, labels = left(n * start + n * (n + 1) // 2), expected_labels(sequence, n)
            return fixed + self._drift * (self._curve(base.rows + left(n)) + per_pair * pairs + per_label * labels)

        return _largest(window.rows, cost, budget)

    def most_prefill_rows(self, base: PlanFeatures, start: int, limit: int, budget: float) -> int:
        """Largest n <= limit such that `base` and rows [start, start + n) of a prompt take <= budget."""
        per_pair, per_prefill = self._linear[2:4]
        fixed = self._seconds(base) + self._drift * (per_prefill - self._curve(base.rows))
        return _largest(
            limit,
            lambda n: fixed + self._drift * (self._curve(base.rows + n) + per_pair * (n * start + n * (n + 1) // 2)),
            budget,
        )

    def most_backward_rows(self, base: PlanFeatures, weight: float, pairs: Callable[[int], int], limit: int, budget: float) -> int:
        """Largest n <= limit such that `base` and a backward slice of n rows, each costing `weight` of them, with pairs(n) query-key
        pairs take <= budget."""
        per_row, per_pair, per_slice = self._linear[7:10]
        fixed = self._seconds(base) + self._drift * per_slice
        return _largest(limit, lambda n: fixed + self._drift * (per_row * weight * n + per_pair * pairs(n)), budget)

    def most_backward_slices(self, base: PlanFeatures, sizes: Iterable[tuple[float, int]], budget: float) -> int:
        """How many backward slices of so many (rows, query-key pairs), the first of them, `base` can have and take <= budget."""
        per_row, per_pair, per_slice = self._linear[7:10]
        seconds = self._seconds(base)
        fit = 0
        for rows, pairs in sizes:
            seconds += self._drift * (per_row * rows + per_pair * pairs + per_slice)
            if seconds > budget:
                break
            fit += 1
        return fit

    def error_quantile(self, q: float) -> float:
        """Quantile of measured / predicted - 1 over recent iterations; 0.1 before there are any."""
        if not self._errors:
            return 0.1
        errors = sorted(self._errors)
        low, share = divmod(q * (len(errors) - 1), 1)  # between two of them as in np.quantile, which takes ten times as long
        below, above = errors[int(low)], errors[min(int(low) + 1, len(errors) - 1)]
        return below + share * (above - below)

    # -------------------------------------------------------------------------------------------------------- learning
    def fit(self, samples: list[tuple[PlanFeatures, float]]) -> None:
        """Set the coefficients from measured (features, seconds); what the samples do not show keeps its value."""
        if not samples:
            raise ValueError("a latency model cannot be fitted to no samples")
        vectors = _vectors([f for f, _ in samples])
        seconds = np.array([t for _, t in samples])
        self._theta = _solve(vectors, seconds, self._theta, stiffness=1e-4)
        measured = np.flatnonzero(vectors[:, 1 : 1 + SEGMENTS].any(axis=0))
        if len(measured):  # beyond the largest batch measured, g goes on as it ended
            last = int(measured[-1])
            self._theta[1 + last : 1 + SEGMENTS] = self._theta[1 + last]
        self._drift = 1.0
        self._vectors, self._seconds_of, self._unseen = self._vectors[:0], self._seconds_of[:0], []
        self._recent.clear()
        self._errors.clear()
        self._unpack()

    def observe(self, features: PlanFeatures, seconds: float) -> None:
        """Learn from an iteration that ran. The drift follows within a few iterations what slows all kinds of work alike; refits,
        which forget, sort out what slows only one."""
        if features.is_empty or seconds <= 0:
            return
        ratio = seconds / self.predict(features)
        self._errors.append(ratio - 1)
        self._unseen.append((features, seconds / self._drift))
        self._recent.append(math.log(ratio * self._drift))
        self._num_observed += 1
        rate = max(self.DRIFT_RATE, 1 / self._num_observed)
        self._drift *= math.exp(rate * (statistics.median(self._recent) - math.log(self._drift)))
        if self._num_observed % self.REFIT_EVERY == 0:
            self._refit()

    def _refit(self) -> None:
        vectors = np.concatenate([self._vectors, _vectors([f for f, _ in self._unseen])])[-self.MEMORY :]
        seconds = np.concatenate([self._seconds_of, [t for _, t in self._unseen]])[-self.MEMORY :]
        self._vectors, self._seconds_of, self._unseen = vectors, seconds, []
        before = vectors @ self._theta
        residuals = np.abs(before / seconds - 1)
        typical = _median(residuals[-self.HALF_LIFE :])
        if typical < EXACT:
            return
        huber = np.minimum(1.0, 2 * typical / np.maximum(residuals, 1e-9))
        weights = huber * 0.5 ** (np.arange(len(seconds))[::-1] / self.HALF_LIFE)
        theta = _solve(vectors, seconds, self._theta, stiffness=0.3, weights=weights)
        # Their common level is the drift's to follow. Were a refit to move it, as its asymmetric errors do a little every time, the drift
        # would make up for it, also in what was not seen lately: training would become ever dearer while only requests are served.
        level = np.exp(np.average(np.log(vectors @ theta / before), weights=weights))
        self._theta = np.where(vectors.any(axis=0), theta / level, self._theta)
        self._unpack()

    # --------------------------------------------------------------------------------------------------------- storage
    def save(self, path: Path) -> None:
        """Without the drift: what slows the machine down now may be gone at the next start."""
        theta = self._theta.tolist()
        coefficients = {"t0": theta[0], **dict(zip(LINEAR, theta[1 + SEGMENTS :], strict=True))}
        Path(path).write_text(json.dumps({"version": VERSION, "coefficients": coefficients, "slopes": theta[1 : 1 + SEGMENTS]}, indent=1))

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Raises OSError if there is no such file, ValueError if it is not a latency model of this version."""
        try:
            stored = json.loads(Path(path).read_text())
            if stored["version"] != VERSION:
                raise ValueError(f"version {stored['version']!r}")
            return cls(stored["coefficients"], stored["slopes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a latency profile: {error}") from error

    def coefficients(self) -> dict[str, float]:
        """For reports: seconds per unit of each term, drift included; `row` is the slope of g at its end."""
        theta = (self._drift * self._theta).tolist()
        return {"t0": theta[0], "row": theta[SEGMENTS], **dict(zip(LINEAR, theta[1 + SEGMENTS :], strict=True))}

    # ------------------------------------------------------------------------------------------------------- internals
    def _unpack(self) -> None:
        """Plain floats for `predict`, which runs many times per iteration."""
        theta = self._theta.tolist()
        self._t0, slopes, self._linear = theta[0], theta[1 : 1 + SEGMENTS], theta[1 + SEGMENTS :]
        self._lines: list[tuple[float, float]] = []  # g(rows) = level + slope * rows, by the number of bits of rows
        at_start = 0.0
        for i, (start, slope) in enumerate(zip(SEGMENT_STARTS, slopes, strict=True)):
            if i > 0:
                at_start += slopes[i - 1] * (start - SEGMENT_STARTS[i - 1])
            self._lines.append((at_start - slope * start, slope))
        self._lines += self._lines[-1:] * (MAX_BITS - SEGMENTS)

    def _seconds(self, features: PlanFeatures) -> float:
        # Unpacked, because asking a named tuple or a list for each takes half as long again.
        rows, decodes, context, pairs, prefills, sampled, labels, windows, backward_rows, backward_pairs, slices, steps = features
        c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10 = self._linear
        level, slope = self._lines[rows.bit_length()]
        return self._drift * (
            self._t0
            + level
            + slope * rows
            + c0 * decodes
            + c1 * context
            + c2 * pairs
            + c3 * prefills
            + c4 * sampled
            + c5 * labels
            + c6 * windows
            + c7 * backward_rows
            + c8 * backward_pairs
            + c9 * slices
            + c10 * steps
        )

    def _curve(self, rows: int) -> float:
        level, slope = self._lines[rows.bit_length()]
        return level + slope * rows


def _vectors(features: list[PlanFeatures]) -> np.ndarray:
    """What the coefficients multiply, [len(features), 1 + SEGMENTS + len(LINEAR)]: one, the rows in each segment of g, the rest."""
    counts = np.array(features, dtype=np.float64)
    segments = np.clip(counts[:, :1] - SEGMENT_STARTS, 0.0, _SEGMENT_ROWS)
    return np.concatenate([np.ones_like(counts[:, :1]), segments, counts[:, 1:]], axis=1)


def _median(values: np.ndarray) -> float:
    """np.median, which takes longer than all the rest of a refit of this size."""
    ordered, middle = np.sort(values), len(values) // 2
    return float(ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)


def _largest(limit: int, cost: Callable[[int], float], budget: float) -> int:
    """Largest n in [0, limit] with cost(n) <= budget, for a cost that never falls; 0 if there is none.

    Costs are close to straight lines, so every other guess is where a line would meet the budget; bisection in between
    bounds the number of guesses.
    """
    if limit <= 0 or (at_high := cost(limit)) <= budget:
        return max(limit, 0)
    low, high, at_low = 0, limit, cost(0)
    if at_low > budget:
        return 0
    straight = True
    while high - low > 1:
        share = (budget - at_low) / (at_high - at_low) if straight else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        straight = not straight
        if (at_middle := cost(middle)) <= budget:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low


def _solve(vectors: np.ndarray, seconds: np.ndarray, prior: np.ndarray, stiffness: float, weights: np.ndarray | None = None) -> np.ndarray:
    """Non-negative ridge regression on relative errors, coefficients pulled towards `prior`.

    Columns are scaled by the prior, so `stiffness` weighs a relative change of a coefficient against a relative error
    of a sample. Non-negativity by dropping the most negative coefficient and solving again.
    """
    shown = vectors.max(axis=0)
    floor = 0.02 * _median(seconds) / np.where(shown > 0, shown, np.inf)  # a coefficient may rise from zero
    scale = np.maximum(prior, floor)
    scale[scale <= 0] = 1.0
    a = vectors * scale / seconds[:, None]
    w = np.ones(len(seconds)) if weights is None else weights
    target = prior / scale
    gram = a.T @ (a * w[:, None])
    gram.flat[:: len(prior) + 1] += stiffness  # the diagonal
    right = a.T @ w + stiffness * target
    active = np.ones(len(prior), dtype=bool)
    solution = np.zeros(len(prior))
    while active.any():
        solution[:] = 0.0
        solution[active] = np.linalg.solve(gram[active][:, active], right[active])
        if solution.min() >= 0:
            break
        active[int(np.argmin(solution))] = False
    return solution * scale
