"""What finetuning does in one iteration: forward windows and backward slices, as many as fit into a time.

A job uses its turn in this order: the optimizer step that its group waits for; windows (they share the weights' way
through the cache with the requests' rows); backward slices, few and large. What it leaves over is the next job's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from flexllm.core import BackwardSlice, FinetuneJob, PlanFeatures, Sequence, SlicePart, TokenWindow
from flexllm.scheduler.jobs import JobState, JobTable, Work
from flexllm.scheduler.latency import LatencyModel, expected_labels

MAX_WAITS = 16  # iterations in a row that finetuning may wait for a larger slack
MIN_ROWS = 16  # of a window or slice that has to be
ROW_UNIT = 8  # GEMMs of other numbers of rows need code of their own (oneDNN) or waste a part of a tile (CUDA)
COHORT_ROWS = 512  # short sequences go down the layers together until their GEMMs are this large
MAX_SLICE_ROWS = 1024  # GEMMs gain nothing beyond, temporaries grow


class SlackFill:
    """One iteration's finetuning work. `features` and `predicted` are those of the iteration, inference included.

    Planning changes no sequence (that is `JobTable.advance`, when the work is done) except for what it holds:
    sequences are admitted and pages taken here.
    """

    def __init__(
        self,
        jobs: JobTable,
        latency: LatencyModel,
        inference: PlanFeatures,
        slack: float,
        ceiling: float,
        max_window_rows: int,
        must_progress: bool,
    ) -> None:
        """`slack`: seconds until the whole iteration has to end; `ceiling`: what it may take however large the slack; `must_progress`: do
        the least possible even if it takes longer."""
        self.windows: list[TokenWindow] = []
        self.backward: list[BackwardSlice] = []
        self.optimizer_steps: list[FinetuneJob] = []
        self.seconds: dict[Work, float] = {}  # by how much each of these makes the iteration longer
        self.features = self._inference = inference
        self.predicted = latency.predict(inference)
        self._jobs = jobs
        self._latency = latency
        self._slack = slack
        self._ceiling = ceiling
        self._budget = min(slack, ceiling)
        self._window_rows_left = max_window_rows
        self._must_progress = must_progress
        self._cursors: dict[int, tuple[int, int]] = {}  # (layer, row) of sequences moved in this plan, by id

    @property
    def is_empty(self) -> bool:
        return not (self.windows or self.backward or self.optimizer_steps)

    def give_turns(self, turns: list[JobState], share: int) -> None:
        """Work for each job in turn until the time is used up; a job may hold `share` sequences (0: none are admitted)."""
        if self.predicted >= self._budget and not self._must_progress:
            return
        for state in turns:
            if state.step_due:
                self._step(state)
            if not (self._forward(state, share) and self._backward(state)):
                return

    # ---------------------------------------------------------------------------------------------------------- forward
    def _forward(self, state: JobState, share: int) -> bool:
        """Windows for the sequences of a job. False when they used up the time."""
        for sequence in self._going_forward(state, share):
            ready = sequence.under_way.rows if sequence.under_way else self._jobs.rows_with_pages(sequence)
            limit = min(self._window_rows_left, ready)
            if limit == 0:
                continue
            rows, whole = limit, sequence.next_window(limit)
            if self._latency.predict(self.features + _features_of(whole)) > self._budget:
                if self._fits_later(whole) and self._waits(state):  # then it does not matter how many rows would fit now
                    return True
                rows = _rounded(self._latency.most_window_rows(self.features, whole, self._budget), limit, self.features.rows)
                if self._fits_later(sequence.next_window(min(limit, 2 * rows + 1))) and self._waits(state):
                    return True
            if rows == 0 and self._is_forced:
                rows = min(limit, MIN_ROWS)
            if rows > 0:
                self._add_window(state, sequence.next_window(rows))
            if rows < limit:
                return rows == 0  # where not one row fits, a slice may
        return True

    def _fits_later(self, window: TokenWindow) -> bool:
        return self._latency.predict(self._inference + _features_of(window)) <= self._ceiling

    def _waits(self, state: JobState) -> bool:
        """Whether work that could be more in another iteration is left for it: a few rows cost nearly what many do, and time left unused
        now is slack later."""
        if self._is_forced or state.waited >= MAX_WAITS:
            return False
        state.waited += 1
        return True

    def _going_forward(self, state: JobState, share: int) -> Iterator[Sequence]:
        yield from [s for s in state.admitted.values() if not s.forward_done]
        while self._window_rows_left and (sequence := self._jobs.admit_next(state, share)) is not None:
            yield sequence

    def _add_window(self, state: JobState, window: TokenWindow) -> None:
        self._jobs.grow(window.sequence, window.end)
        self.windows.append(window)
        self._window_rows_left -= window.rows
        state.waited = 0
        self._count(_features_of(window), window)

    # --------------------------------------------------------------------------------------------------------- backward
    def _backward(self, state: JobState) -> bool:
        """Slices for sequences whose forward was done before this iteration, and the optimizer step if they complete the
        group. False when the time is used up."""
        while cohort := self._cohort(state):
            if not self._bring_down(state, cohort):
                return False
        if self._completes_group(state):
            self._step(state)
        return True

    def _cohort(self, state: JobState) -> list[Sequence]:
        """Sequences to go down together: the furthest along, and as many others of its save level as make up a large GEMM."""
        lowest = state.job.lowest_layer
        ready = [s for s in state.admitted.values() if s.forward_done and self._cursor(s)[0] >= lowest]
        cohort: list[Sequence] = []
        rows = 0
        for sequence in sorted(ready, key=lambda s: (self._cursor(s)[0], s.id)):
            if cohort and sequence.level != cohort[0].level:
                continue
            rows += sequence.length
            if cohort and rows > COHORT_ROWS:
                break
            cohort.append(sequence)
        return cohort

    def _bring_down(self, state: JobState, cohort: list[Sequence]) -> bool:
        """Slices from the cohort's highest layer on, so that those behind come level and all go on in common slices.

        False when the time is used up first.
        """
        while True:
            cursors = [self._cursor(s) for s in cohort]
            layer, _ = max(cursors)
            if layer < state.job.lowest_layer:
                return True
            level = [(s, row) for s, (at, row) in zip(cohort, cursors, strict=True) if at == layer]
            whole = sum([row for _, row in level])
            first = cohort[0]
            layers = layer - first.lowest_of_slice(layer) + 1
            if whole == sum([s.length for s in cohort]) <= MAX_SLICE_ROWS and self._add_layers(state, layer, layers, cohort):
                continue
            slices = _equal_slices(layer, level)
            weight = layers * first.save_level.cost
            sizes = [(weight * item.rows, layers * sum([p.pairs for p in item.parts])) for item in slices]
            fit = self._latency.most_backward_slices(self.features, sizes, self._budget)
            if fit > 0:
                self._add_slices(state, slices[:fit], sizes[:fit])
            if fit < len(slices) and not self._add_rows_of(state, slices[fit]):
                return False

    def _add_rows_of(self, state: JobState, item: BackwardSlice) -> bool:
        """Of a slice that does not fit: nothing if it may wait, else as many of its rows as ever fit, the last ones. False when the time
        is used up."""
        level = [(part.sequence, part.end) for part in item.parts]
        layers, limit = item.num_layers, item.rows
        weight = layers * item.parts[0].sequence.save_level.cost
        pairs = partial(_last_pairs, level, layers)

        def most(base: PlanFeatures, budget: float) -> int:
            return self._latency.most_backward_rows(base, weight, pairs, limit, budget)

        if self._latency.predict(self._inference + _features_of_slice(item)) <= self._ceiling and self._waits(state):
            return False
        rows = _rounded(most(self.features, self._budget), limit)
        if rows < most(self._inference, self._ceiling) and self._waits(state):
            return False
        if self._is_forced:
            rows = max(rows, min(limit, MIN_ROWS))
        if rows > 0:
            some = BackwardSlice(item.layer, _last_rows(level, rows))
            self._add_slices(state, [some], [(some.cost, some.pairs)])
        return rows == limit

    def _add_layers(self, state: JobState, layer: int, layers: int, cohort: list[Sequence]) -> int:
        """As many whole slices of `layers` layers as fit, from `layer` on: all alike, so they are planned at once. Returns how many."""
        parts = tuple(SlicePart(s, 0, s.length) for s in cohort)
        item = BackwardSlice(layer, parts)
        one = _features_of_slice(item)
        seconds = self._latency.predict(self.features + one) - self.predicted
        count = (layer - state.job.lowest_layer + 1) // layers
        if seconds > 0:
            count = min(count, int((self._budget - self.predicted) / seconds))
        if count <= 0:
            return 0
        items = [item, *(BackwardSlice(layer - i * layers, parts) for i in range(1, count))]
        below = layer - count * layers
        for sequence in cohort:
            self._cursors[sequence.id] = (below, sequence.length)
        self._book(state, items, PlanFeatures._make(count * value for value in one))
        return count

    def _add_slices(self, state: JobState, slices: list[BackwardSlice], sizes: list[tuple[float, int]]) -> None:
        """Slices of one layer; `sizes`: their (cost, pairs)."""
        layer, below = slices[0].layer, slices[0].lowest - 1
        for item in slices:
            for sequence, start, _ in item.parts:
                self._cursors[sequence.id] = (layer, start) if start else (below, sequence.length)
        cost, pairs = map(sum, zip(*sizes, strict=True))
        self._book(state, slices, PlanFeatures(backward_rows=cost, backward_pairs=pairs, backward_slices=len(slices)))

    def _book(self, state: JobState, slices: list[BackwardSlice], added: PlanFeatures) -> None:
        self.backward += slices
        state.waited = 0
        self._count(added, *slices)

    def _completes_group(self, state: JobState) -> bool:
        lowest = state.job.lowest_layer
        return (
            not (state.validating or state.pending)
            and state.num_undone > 0
            and all(self._cursor(s)[0] < lowest for s in state.admitted.values())
        )

    def _step(self, state: JobState) -> None:
        step = PlanFeatures(optimizer_steps=1)
        limit = self._slack if self.is_empty else self._budget  # a step is never cut: one beyond the ceiling comes alone
        if self._latency.predict(self.features + step) <= limit or self._is_forced:
            self.optimizer_steps.append(state.job)
            self._count(step, state.job)

    # -------------------------------------------------------------------------------------------------------- internals
    @property
    def _is_forced(self) -> bool:
        return self._must_progress and self.is_empty

    def _cursor(self, sequence: Sequence) -> tuple[int, int]:
        return self._cursors.get(sequence.id) or (sequence.layer, sequence.row)

    def _count(self, added: PlanFeatures, *work: Work) -> None:
        """`added`: features of pieces of work that are all alike."""
        self.features += added
        predicted = self._latency.predict(self.features)
        self.seconds |= dict.fromkeys(work, (predicted - self.predicted) / len(work))
        self.predicted = predicted


def _rounded(rows: int, of: int, beside: int = 0) -> int:
    """`rows` of the `of` that there are, or a few less, so that with those `beside` them they are a multiple of ROW_UNIT; not where the
    rest would then go in one piece more."""
    fewer = rows - (beside + rows) % ROW_UNIT
    return fewer if fewer >= MIN_ROWS and -(-of // fewer) == -(-of // rows) else rows


def _features_of(window: TokenWindow) -> PlanFeatures:
    labels = expected_labels(window.sequence, window.rows)
    return PlanFeatures(rows=window.rows_left, prefill_pairs=window.pairs_left, label_rows=labels, windows=1)


def _features_of_slice(item: BackwardSlice) -> PlanFeatures:
    return PlanFeatures(backward_rows=item.cost, backward_pairs=item.pairs, backward_slices=1)


def _equal_slices(layer: int, level: list[tuple[Sequence, int]]) -> list[BackwardSlice]:
    """The rows that sequences have left at a layer ((sequence, rows left) each), the last first, in slices of the same size."""
    slices = []
    left = sum([row for _, row in level])
    while left:
        rows = -(-left // -(-left // MAX_SLICE_ROWS))
        parts = _last_rows(level, rows)
        slices.append(BackwardSlice(layer, parts))
        sequence, start, _ = parts[-1]
        level = [(sequence, start), *level[len(parts) :]] if start else level[len(parts) :]
        left -= rows
    return slices


def _last_rows(level: list[tuple[Sequence, int]], n: int) -> tuple[SlicePart, ...]:
    """The last `n` rows that sequences at one layer have left ((sequence, rows left) each): all of the first, then the next."""
    parts = []
    for sequence, end in level:
        if n <= 0:
            break
        parts.append(SlicePart(sequence, max(0, end - n), end))
        n -= end
    return tuple(parts)


def _last_pairs(level: list[tuple[Sequence, int]], layers: int, n: int) -> int:
    return layers * sum([part.pairs for part in _last_rows(level, n)])
