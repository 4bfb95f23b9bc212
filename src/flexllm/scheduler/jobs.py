"""Finetuning jobs: the order of examples, the step under way, the memory its sequences hold, whose turn it is."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count

from flexllm.core import BackwardSlice, FinetuneJob, JobStatus, Sequence, StepPlan, TokenWindow
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget

Work = TokenWindow | BackwardSlice | FinetuneJob  # a job stands for its optimizer step


def epoch_order(seed: int, epoch: int, n: int, shuffle: bool) -> list[int]:
    """The order of `n` examples in an epoch: a permutation that depends on nothing but the arguments."""
    order = list(range(n))
    if shuffle:
        random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def validation_due(job: FinetuneJob) -> bool:
    """Whether a validation pass follows the step done last."""
    if not job.valid_lengths or job.step == 0:
        return False
    return job.step % (job.eval_every or job.steps_per_epoch) == 0 or job.step >= job.total_steps


class JobState:
    """A job and its group: each sequence of it is pending (holds nothing), admitted (holds memory) or done."""

    def __init__(self, job: FinetuneJob) -> None:
        self.job = job
        self.pending: deque[Sequence] = deque()
        self.admitted: dict[int, Sequence] = {}  # by id, in the order of admission
        self.num_undone = 0  # sequences of the group
        self.validating = False  # the group is a validation pass
        self.waited = 0  # iterations in a row in which its work waited for a larger slack
        self._validated_step = -1
        self._epoch_order: tuple[int, list[int]] = (-1, [])

    @property
    def is_active(self) -> bool:
        return self.job.status in (JobStatus.QUEUED, JobStatus.RUNNING)

    @property
    def step_due(self) -> bool:
        """Every gradient of the group is in; the optimizer step is what remains."""
        return bool(self.job.group) and not self.validating and self.num_undone == 0

    def begin_group(self, ids: Iterator[int]) -> None:
        """Form the next group: a validation pass if one is due, else the examples of the next optimizer step."""
        job = self.job
        assert not job.group
        assert not self.admitted
        self.validating = validation_due(job) and self._validated_step != job.step
        lengths = job.valid_lengths if self.validating else job.lengths
        examples = list(range(len(lengths))) if self.validating else self._examples_of_step()
        for example in examples:
            sequence = Sequence(next(ids), job, example, lengths[example], train=not self.validating)
            sequence.rewind()
            job.group.append(sequence)
        self.pending.extend(job.group)
        self.num_undone = len(job.group)

    def end_group(self) -> None:
        """After the optimizer step, or when a validation pass is complete."""
        job = self.job
        if self.validating:
            self._validated_step = job.step
        else:
            job.step += 1
        job.group = []
        self.num_undone = 0
        to_validate = validation_due(job) and self._validated_step != job.step
        if job.step >= job.total_steps and not to_validate:
            job.status = JobStatus.SUCCEEDED

    def _examples_of_step(self) -> list[int]:
        job = self.job
        epoch, step = divmod(job.step, job.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, epoch_order(job.seed, epoch, len(job.lengths), job.shuffle))
        return self._epoch_order[1][step * job.group_size : (step + 1) * job.group_size]


class JobTable:
    """All unfinished jobs, and every page and byte that their sequences hold.

    A sequence is admitted when its bytes can be reserved and the pages for its whole length are free, beyond those
    promised to the sequences admitted before it and a watermark left to requests. Its pages are taken window by window.
    """

    def __init__(self, pool: BlockPool, budget: ByteBudget, max_sequences: int) -> None:
        self._pool = pool
        self._budget = budget
        self._max_sequences = max_sequences
        self._watermark = max(1, pool.num_blocks // 100)
        self._states: dict[str, JobState] = {}
        self._pausing: list[JobState] = []  # since the last plan
        self._served: dict[str, float] = {}  # finetuning seconds received by each tenant that has unfinished jobs
        self._ids = count()
        self._released: dict[int, Sequence] = {}  # since the last plan that ran: what the trainer has to drop,
        self._restarted: dict[str, FinetuneJob] = {}  # and whose gradients it has to zero

    # ------------------------------------------------------------------------------------------------------ in and out
    @property
    def jobs(self) -> list[FinetuneJob]:
        return [s.job for s in self._states.values()]

    @property
    def has_work(self) -> bool:
        return bool(self._released) or any(s.is_active or s.admitted for s in self._states.values())

    def add(self, job: FinetuneJob) -> None:
        """Raises ValueError if a sequence of the job could never be held. A job whose steps are all done succeeds at once."""
        assert job.num_layers > job.lowest_layer >= 0, f"job {job.id} is not compiled"
        assert job.levels, f"job {job.id} has no save level"
        if job.id in self._states:
            raise ValueError(f"job id {job.id!r} is in use")
        self._check_fits(job)
        if job.step >= job.total_steps and not job.valid_lengths:
            job.status = JobStatus.SUCCEEDED
            return
        self._catch_up(job)
        self._states[job.id] = JobState(job)

    def pause(self, job_id: str) -> None:
        """Stop giving time to a job. Its step under way is dropped, and its memory freed, when the next plan is made."""
        state = self._get(job_id)
        state.job.status = JobStatus.PAUSED
        self._pausing.append(state)

    def resume(self, job_id: str) -> None:
        job = self._get(job_id).job
        if job.status is JobStatus.PAUSED:
            self._catch_up(job)
            job.status = JobStatus.QUEUED

    def remove(self, job_id: str) -> list[Sequence]:
        """Forget a job; returns the sequences that held memory, for the trainer to drop. Unknown ids hold nothing."""
        state = self._states.pop(job_id, None)
        if state is None:
            return []
        self._forget_tenant(state.job.tenant)
        dropped = list(state.admitted.values())
        for sequence in dropped:
            self._free(state, sequence)
        dropped += [s for s in self._released.values() if s.job is state.job]
        self._released = {i: s for i, s in self._released.items() if s.job is not state.job}
        self._restarted.pop(job_id, None)
        state.job.group = []
        return dropped

    # --------------------------------------------------------------------------------------------------------- planning
    def take_turns(self) -> list[JobState]:
        """Jobs that may be given time: those of the tenant that has had least of it first, and of these the one that has; each with
        a group under way."""
        turns: list[tuple[float, float, int, JobState]] = []
        for state in self._states.values():
            if not state.is_active:
                continue
            job = state.job
            job.status = JobStatus.RUNNING
            if not job.group:
                state.begin_group(self._ids)
            turns.append((self._served[job.tenant], job.served, len(turns), state))
        turns.sort()
        return [state for _, _, _, state in turns]

    def drop_paused(self) -> None:
        for state in self._pausing:
            if state.job.status is JobStatus.PAUSED and state.admitted:
                self._restart(state)
        self._pausing.clear()

    def admit_next(self, state: JobState, share: int) -> Sequence | None:
        """Admit the next pending sequence of a job that may hold `share` sequences; None if there is none or no room."""
        if not state.pending or self._released or len(state.admitted) >= share:
            return None
        if sum(len(s.admitted) for s in self._states.values()) >= self._max_sequences:
            return None
        sequence = state.pending[0]
        spare = self._pool.num_free - self._promised() - self._watermark
        if self._pool.blocks_for(sequence.length) > spare or not self._reserve(state, sequence):
            return None
        state.pending.popleft()
        state.admitted[sequence.id] = sequence
        return sequence

    def _reserve(self, state: JobState, sequence: Sequence) -> bool:
        """Bytes for a sequence at the fastest level that has them. A job with a sequence in flight rather waits for that one's
        bytes than go to a slower level."""
        slowest = max((q.level for q in state.admitted.values()), default=len(state.job.levels) - 1)
        for level in range(slowest + 1):
            sequence.level = level
            if self._budget.reserve(_owner(sequence), _saved_bytes(sequence)):
                return True
        return False

    def rows_with_pages(self, sequence: Sequence) -> int:
        """Rows that could go forward now: those with pages, and those the pool has pages for above the watermark."""
        blocks = len(sequence.blocks) + max(0, self._pool.num_free - self._watermark)
        return min(sequence.length, blocks * self._pool.block_size) - sequence.forward

    def grow(self, sequence: Sequence, end: int) -> None:
        """Pages for rows [0, end)."""
        more = self._pool.blocks_for(end) - len(sequence.blocks)
        if more > 0:
            after = sequence.blocks[-1] if sequence.blocks else None
            sequence.blocks += self._pool.allocate(more, after=after, room=self._pool.blocks_for(sequence.length))

    def reclaimable(self) -> int:
        return sum(len(q.blocks) for s in self._states.values() for q in s.admitted.values())

    def reclaim(self, wanted: int) -> None:
        """Give pages back until `wanted` are free: first sequences without gradients yet, the youngest first (they start
        over); then whole groups, the one with the least backward work done first (their gradients start over)."""
        if self._pool.num_free >= wanted:
            return
        forward_only = [(s, q) for s in self._states.values() for q in s.admitted.values() if q.blocks and not q.backward_begun]
        for state, sequence in sorted(forward_only, key=lambda item: -item[1].id):
            self._rewind(state, sequence)
            if self._pool.num_free >= wanted:
                return
        for state in sorted((s for s in self._states.values() if s.admitted), key=_backward_done):
            self._restart(state)
            if self._pool.num_free >= wanted:
                return

    def released(self) -> tuple[Sequence, ...]:
        return tuple(self._released.values())

    def restarted(self) -> tuple[FinetuneJob, ...]:
        return tuple(self._restarted.values())

    # ---------------------------------------------------------------------------------------------------------- results
    def advance(self, plan: StepPlan, seconds: Mapping[Work, float]) -> None:
        """Book what an iteration did, and the `seconds` of each piece of it as time given to its job. Whatever belongs to a job
        removed since it was planned is passed over."""
        for sequence in plan.released:
            self._released.pop(sequence.id, None)
        for job in plan.restarted:
            self._restarted.pop(job.id, None)
        for window in plan.windows:
            self._charge(window.sequence.job, seconds[window])
            self._advance_forward(window)
        for window, layer in plan.suspended:
            job = window.sequence.job
            self._charge(job, seconds[window] * (layer - window.layer) / job.num_layers)
            if layer and self._state_of(window.sequence) is not None and window.end == _end_under_way(window):
                window.sequence.under_way = replace(window, layer=layer)  # a part of what was under way is again where that is
        for item in plan.backward:
            self._charge(item.job, seconds[item])
            self._advance_backward(item)
        for job in plan.optimizer_steps:
            self._charge(job, seconds[job])
            if (state := self._states.get(job.id)) is not None and state.job is job:
                self._end_group(state)

    def check_integrity(self) -> None:
        for state in self._states.values():
            job = state.job
            undone = [q for q in job.group if not q.done]
            assert {q.id for q in undone} == state.admitted.keys() | {q.id for q in state.pending}
            assert len(undone) == state.num_undone
            assert all(q.forward == 0 and not (q.blocks or q.under_way or q.backward_begun) for q in state.pending)
            for sequence in state.admitted.values():
                assert 0 <= sequence.forward <= min(sequence.length, len(sequence.blocks) * self._pool.block_size)
                assert len(sequence.blocks) <= self._pool.blocks_for(sequence.length)
                assert sequence.forward_done or not sequence.backward_begun
                if (window := sequence.under_way) is not None:
                    assert sequence.forward == window.start < window.end <= len(sequence.blocks) * self._pool.block_size
                    assert 0 < window.layer <= job.num_layers
                assert self._budget.held_by(_owner(sequence)) == _saved_bytes(sequence)
        assert sum(len(s.admitted) for s in self._states.values()) <= self._max_sequences
        assert self._served.keys() == {s.job.tenant for s in self._states.values()}
        self._budget.check_integrity()

    def blocks_held(self) -> list[int]:
        return [b for s in self._states.values() for q in s.admitted.values() for b in q.blocks]

    # -------------------------------------------------------------------------------------------------------- internals
    def _get(self, job_id: str) -> JobState:
        if job_id not in self._states:
            raise ValueError(f"unknown job {job_id!r}; unfinished jobs: {', '.join(self._states) or 'none'}")
        return self._states[job_id]

    def _check_fits(self, job: FinetuneJob) -> None:
        tokens = max([*job.lengths, *job.valid_lengths])
        missing_blocks = self._pool.blocks_for(tokens) + self._watermark - self._pool.num_blocks
        if missing_blocks > 0:
            missing = missing_blocks * self._pool.block_size
            raise ValueError(f"an example of {tokens} tokens does not fit in the K/V cache: {missing} tokens short")
        by_sequences = sum(_saved_bytes(q) for s in self._states.values() for q in s.admitted.values())
        tokens = max(job.lengths)
        smallest = min(job.levels, key=lambda level: level.bytes_per_token)
        missing = tokens * smallest.bytes_per_token - (self._budget.free + by_sequences)
        if missing > 0:
            raise ValueError(
                f"the activations of an example of {tokens} tokens do not fit in the finetuning memory: {missing} bytes short at "
                f"save level {smallest.name!r}, the smallest"
            )

    def _catch_up(self, job: FinetuneJob) -> None:
        """A job that comes to the others starts level with them, and so does a tenant: it has no claim on time from before it was here."""
        active = [s.job for s in self._states.values() if s.is_active]
        job.served = max(job.served, min((j.served for j in active if j.tenant == job.tenant), default=0.0))
        if all(j.tenant != job.tenant for j in active):
            level = min((self._served[j.tenant] for j in active), default=0.0)
            self._served[job.tenant] = max(self._served.get(job.tenant, 0.0), level)

    def _forget_tenant(self, tenant: str) -> None:
        """If it has no jobs any more."""
        if all(s.job.tenant != tenant for s in self._states.values()):
            del self._served[tenant]

    def _promised(self) -> int:
        """Pages that admitted sequences have yet to take."""
        admitted = (q for s in self._states.values() for q in s.admitted.values())
        return sum(self._pool.blocks_for(q.length) - len(q.blocks) for q in admitted)

    def _charge(self, job: FinetuneJob, seconds: float) -> None:
        """Book time given to a job."""
        if (state := self._states.get(job.id)) is not None and state.job is job:
            job.served += seconds / job.weight
            self._served[job.tenant] += seconds

    def _advance_forward(self, window: TokenWindow) -> None:
        sequence = window.sequence
        state = self._state_of(sequence)
        if state is None:
            return
        assert sequence.forward == window.start
        rest = replace(window, start=window.end, end=_end_under_way(window))
        sequence.forward, sequence.under_way = window.end, rest if rest.rows else None
        if sequence.done:
            self._complete(state, sequence)
            if state.num_undone == 0:  # only a validation pass ends with a forward
                self._end_group(state)

    def _advance_backward(self, item: BackwardSlice) -> None:
        for part in item.parts:
            sequence = part.sequence
            state = self._state_of(sequence)
            if state is None:
                continue
            assert sequence.forward_done
            assert (sequence.layer, sequence.row) == (item.layer, part.end)
            sequence.row = part.start
            if sequence.row == 0:
                sequence.layer, sequence.row = item.lowest - 1, sequence.length
            if sequence.done:
                self._complete(state, sequence)

    def _state_of(self, sequence: Sequence) -> JobState | None:
        state = self._states.get(sequence.job.id)
        return state if state is not None and state.admitted.get(sequence.id) is sequence else None

    def _complete(self, state: JobState, sequence: Sequence) -> None:
        self._free(state, sequence)
        state.num_undone -= 1

    def _end_group(self, state: JobState) -> None:
        state.end_group()
        if state.job.status.is_final:
            del self._states[state.job.id]
            self._forget_tenant(state.job.tenant)

    def _free(self, state: JobState, sequence: Sequence) -> None:
        del state.admitted[sequence.id]
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        self._budget.release(_owner(sequence))

    def _rewind(self, state: JobState, sequence: Sequence) -> None:
        self._free(state, sequence)
        sequence.rewind()
        self._released[sequence.id] = sequence
        state.pending.appendleft(sequence)

    def _restart(self, state: JobState) -> None:
        """Start the group under way over. Validation keeps what is done: it has no gradients."""
        for sequence in reversed(list(state.admitted.values())):
            if sequence.backward_begun:
                self._restarted[state.job.id] = state.job
            self._rewind(state, sequence)
        done = [q for q in state.job.group if q.done]
        if state.validating or not (done or state.job.id in self._restarted):
            return
        self._restarted[state.job.id] = state.job
        for sequence in done:
            sequence.rewind()
            self._released[sequence.id] = sequence
        state.pending = deque(state.job.group)
        state.num_undone = len(state.job.group)


def _end_under_way(window: TokenWindow) -> int:
    """Of the rows that were under way when the window was planned: its own end, if it was not a part of them."""
    under_way = window.sequence.under_way
    return window.end if under_way is None else under_way.end


def _owner(sequence: Sequence) -> str:
    return f"seq-{sequence.id}"


def _saved_bytes(sequence: Sequence) -> int:
    """Validation goes forward only and saves nothing."""
    return sequence.length * sequence.save_level.bytes_per_token if sequence.train else 0


def _backward_done(state: JobState) -> int:
    """Rows times layers of backward work that a restart of the group would lose."""
    layers = state.job.num_layers
    return sum((layers - 1 - q.layer) * q.length + q.length - q.row for q in state.job.group if q.train)
