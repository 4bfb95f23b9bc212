"""Requests: who waits, who runs, which rows go next, who gives way when pages run out.

What `schedule` reads every iteration (next rows, deadlines, context sums, who needs a page) is kept up to date as tokens
arrive, so that planning an iteration costs next to nothing per running request.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from functools import cache, partial
from itertools import chain, islice
from typing import NamedTuple

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinishReason, InferenceChunk, PlanFeatures, Request, RequestStatus, StepResult, TokenOutput
from flexllm.memory.block_pool import BlockPool
from flexllm.scheduler.latency import LatencyModel

PACE = 0.9  # of the TPOT objective is aimed at: a last token that comes late cannot be made up for
SAFETY = 2  # TPOTs, about as many iterations, are to be left of its TTFT when a prompt that had to wait is done
MAX_LOOK = 64  # prompts of a class that are asked how long they can wait
LEAST_ROWS = 16  # of a prompt that can wait: it goes on, if slowly, whatever the decodes beside it,
AS_GOOD_AS_FREE = 1.02  # and with as many more as take no longer


class QueueFullError(ValueError):
    """max_waiting requests wait already; the newcomer was not taken."""


class PrefillLimit(NamedTuple):
    """How far the prompts of a class may go in an iteration."""

    seconds: float  # that it may be predicted to take
    urgent: float  # the same, for what they may not exceed whatever they need themselves
    needed: Callable[[], float]  # prompt rows that it has to have nevertheless; a look at the queue


class PriorityClass:
    """The requests of one SLO class that have no token yet, or lost their pages. Both queues are FCFS."""

    def __init__(self, slo: SLO) -> None:
        self.slo = slo
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []  # hold the pages of all their tokens


class RequestQueues:
    """All unfinished requests.

    waiting --admit--> prefilling --last prefill chunk--> decoding --> gone; a preempted request waits again, in front.
    Classes with the tighter TTFT objective go first; within a class, first come first served.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, latency: LatencyModel) -> None:
        self._config = config
        self._pool = pool
        self._latency = latency
        self._max_running = min(config.max_running, config.max_batch_tokens)  # every running request may be decoding
        self._watermark = pool.num_blocks // 100
        self._requests: dict[str, Request] = {}
        self._classes: dict[str, PriorityClass] = {}  # the most urgent first
        self._decoding: dict[str, Request] = {}
        self._next_rows: dict[str, InferenceChunk] = {}  # of each decoding request
        self._deadlines: dict[str, float] = {}  # of the next token of each decoding request,
        self._next_due: float | None = None  # and the earliest of them; None: to be looked up
        self._need_page: dict[str, Request] = {}  # decoding, and the next row has no page yet
        self._decode_context = 0  # keys that the next row of each decoding request sees
        self.num_waiting = 0
        self.page_blocked = False  # the last plan left a request waiting for pages
        self.num_preemptions = 0  # since the start

    def reconfigure(self, config: SchedulerConfig) -> None:
        """Other objectives: the order of the classes follows, and when the next token of each request is due."""
        self._config = config
        for name, queue in self._classes.items():
            queue.slo = config.slo_of(name)
        self._order_classes()
        self._deadlines = {i: self._deadline(r, config.slo_of(r.priority)) for i, r in self._decoding.items()}
        self._next_due = None

    # ------------------------------------------------------------------------------------------------------- in and out
    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._requests) - self.num_waiting

    def add(self, request: Request) -> None:
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        if not request.prompt_ids:
            raise ValueError("the prompt is empty")
        if len(request.prompt_ids) >= self._pool.capacity:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens; the K/V cache holds {self._pool.capacity}, one less must do"
            )
        if self.num_waiting >= self._config.max_waiting:
            raise QueueFullError(f"{self.num_waiting} requests are waiting already")
        max_len = len(request.prompt_ids) + request.sampling.max_tokens
        request.max_len = min(request.max_len or max_len, max_len, self._pool.capacity)
        self._requests[request.id] = request
        self._class_of(request).waiting.append(request)
        self.num_waiting += 1

    def remove(self, request_id: str, reason: FinishReason) -> Request | None:
        """Take a request out in whatever state it is; its pages are free. None if there is none of that id."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is RequestStatus.WAITING:
            self._class_of(request).waiting.remove(request)
            self.num_waiting -= 1
        else:
            self._stop_running(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        return request

    # --------------------------------------------------------------------------------------------------------- planning
    def plan(
        self, now: float, reclaim: Callable[[int], None], reclaimable: Callable[[], int], in_time: Callable[[float], float]
    ) -> tuple[InferenceChunk, ...]:
        """The inference rows of an iteration: every decoding request, then prefill up to max_batch_tokens, as far as the tokens that are
        due allow; further if a prompt's own TTFT needs it, but then making only those of its class and of less urgent ones late.

        `in_time(seconds)`: what an iteration may be planned to take if it has to end within so many seconds. `reclaim(n)` takes
        pages from finetuning until n are free or it has none left; `reclaimable()` is what it holds.
        """
        self._grow_all(reclaim)
        decodes: list[InferenceChunk] = []  # beside the next row of every decoding request
        prefills: list[InferenceChunk] = []
        rows_left = self._config.max_batch_tokens - len(self._next_rows)
        self.page_blocked = False
        candidates = self._prefill_order(reclaim, reclaimable)
        limits: dict[str, PrefillLimit] = {}  # by class
        while rows_left > 0 and (candidate := next(candidates, None)) is not None:
            limit = min(rows_left, candidate.num_tokens - candidate.num_computed)
            if candidate.priority not in limits:
                limits[candidate.priority] = self._prefill_limit(self._class_of(candidate), now, in_time)
            rows = self._prefill_rows(candidate, self._features_beside(decodes, prefills), limit, limits[candidate.priority])
            start, end = candidate.num_computed, candidate.num_computed + rows
            chunk = InferenceChunk(candidate, start, end, end == candidate.num_tokens)
            (decodes if chunk.is_decode else prefills).append(chunk)  # a prefill's last row alone is a decode row to the model
            rows_left -= rows
            if rows < limit:
                break
        return (*self._next_rows.values(), *decodes, *prefills)

    def _prefill_limit(self, queue: PriorityClass, now: float, in_time: Callable[[float], float]) -> PrefillLimit:
        all_due, urgent_due = self._earliest_due(), math.inf
        if more_urgent := {name for name, other in self._classes.items() if other.slo.ttft < queue.slo.ttft}:
            urgent_due = min((at for i, at in self._deadlines.items() if self._requests[i].priority in more_urgent), default=math.inf)
        return PrefillLimit(in_time(all_due - now), in_time(urgent_due - now), cache(partial(self._needed_rows, queue, now)))

    def _needed_rows(self, queue: PriorityClass, now: float) -> float:
        """Prompt rows of a class that every iteration has to have so that its first tokens come in time: with so many, the queue up to each
        request is done when the time of SAFETY tokens is left, decode rows and all. inf if nothing is quick enough."""
        full = self._config.max_batch_tokens
        per_row = self._latency.predict(PlanFeatures(rows=full, prefill_pairs=full * full // 2, prefills=1)) / full
        beside = self._latency.predict(self._features_beside((), ()))  # seconds of an iteration without prompts
        latest = now + SAFETY * queue.slo.tpot
        rows, needed = 0, 0.0
        for request in islice(chain(queue.prefilling, queue.waiting), MAX_LOOK):
            rows += len(request.prompt_ids) + len(request.output_ids) - request.num_computed
            spare = self._deadline(request, queue.slo) - latest - rows * per_row
            if spare <= 0:
                return math.inf
            if rows > needed * spare:
                needed = rows / spare
        return needed * beside

    def _prefill_rows(self, request: Request, beside: PlanFeatures, limit: int, at_most: PrefillLimit) -> int:
        """Rows of a prompt that join those of an iteration, at least LEAST_ROWS: where a device takes long to be told of any iteration,
        small ones would be late as well, only more often."""

        def within(seconds: float) -> int:
            if seconds == math.inf:
                return limit
            rows, least = self._latency.most_prefill_rows(beside, request.num_computed, limit, seconds), min(limit, LEAST_ROWS)
            if rows >= least:
                return rows
            late = self._latency.predict(beside._replace(rows=beside.rows + least, prefills=beside.prefills + 1))
            return max(least, self._latency.most_prefill_rows(beside, request.num_computed, limit, AS_GOOD_AS_FREE * late))

        rows = within(at_most.seconds)
        if rows < limit:
            needed = at_most.needed() - (beside.rows - len(self._decoding))
            rows = max(rows, limit if needed >= limit else math.ceil(needed))
        return min(rows, within(at_most.urgent))

    def features(self, chunks: tuple[InferenceChunk, ...]) -> PlanFeatures:
        """Of the chunks `plan` returned just now: what `features_of` computes, without a look at every decode row."""
        further = chunks[len(self._decoding) :]
        return self._features_beside([c for c in further if c.is_decode], [c for c in further if not c.is_decode])

    def _features_beside(self, decodes: SequenceOf[InferenceChunk], prefills: SequenceOf[InferenceChunk]) -> PlanFeatures:
        """The same of the next rows of all decoding requests and these chunks of others."""
        rows = len(self._decoding) + len(decodes)
        return PlanFeatures(
            rows=rows + sum([c.end - c.start for c in prefills]),
            decode_rows=rows,
            decode_context=self._decode_context + sum([c.end for c in decodes]),
            prefill_pairs=sum([c.pairs for c in prefills]),
            prefills=len(prefills),
            sampled_rows=rows + sum([c.sample for c in prefills]),
        )

    def slack(self, now: float) -> float:
        """Seconds until the earliest token is due, less the reserve, and none while a prompt is computed or waits: whatever slows down the
        requests before it makes it late, and finetuning beside its rows, which fill the GEMMs, gains nothing. At least 0; inf without
        requests."""
        if len(self._deadlines) < len(self._requests):
            return 0.0
        return max(0.0, self._earliest_due() - self._config.reserve - now)

    def _earliest_due(self) -> float:
        """When the first of the decoding requests has to have its next token; inf if none decodes."""
        if self._next_due is None:
            self._next_due = min(self._deadlines.values(), default=math.inf)
        return self._next_due

    # ---------------------------------------------------------------------------------------------------------- results
    def advance(self, chunks: tuple[InferenceChunk, ...], result: StepResult) -> list[TokenOutput]:
        """Book what an iteration computed and sampled. Requests removed since it was planned are passed over.

        Written out in one loop, because it runs for every token.
        """
        outputs = []
        tokens, now, page = result.tokens, result.end, self._pool.block_size
        requests, decoding, classes = self._requests, self._decoding, self._classes
        next_rows, deadlines, deadline = self._next_rows, self._deadlines, self._deadline
        new = tuple.__new__  # the constructors of named tuples are Python frames: twice the cost
        for request, _, end, sample in chunks:
            request_id = request.id
            if requests.get(request_id) is not request:
                continue
            request.num_computed = end
            if not sample:
                continue
            sampled = tokens[request_id]
            token = sampled.token_id
            request.output_ids.append(token)
            request.last_token_time = now
            if request_id in decoding:
                self._decode_context += 1
            else:
                self._start_decoding(request, now)
            reason = _finish_reason(request, token, end + 1)
            if reason is None:
                next_rows[request_id] = new(InferenceChunk, (request, end, end + 1, True))
                deadlines[request_id] = deadline(request, classes[request.priority].slo)
                if end >= len(request.blocks) * page:
                    self._need_page[request_id] = request
            else:
                self.remove(request_id, reason)
            outputs.append(new(TokenOutput, (request_id, token, sampled, reason, None, None, 0)))
        self._next_due = None
        self._earliest_due()  # now, while they are in the caches
        return outputs

    def check_integrity(self) -> None:
        prefilling = [r for c in self._classes.values() for r in c.prefilling]
        waiting = [r for c in self._classes.values() for r in c.waiting]
        running = [*prefilling, *self._decoding.values()]
        assert (len(waiting), len(running)) == (self.num_waiting, self.num_running)
        assert {r.id for r in [*waiting, *running]} == self._requests.keys()
        assert all(r.status is RequestStatus.WAITING and not r.blocks and r.num_computed == 0 for r in waiting)
        assert all(r.status is RequestStatus.RUNNING for r in running)
        assert all(0 <= r.num_computed <= min(r.num_tokens, len(r.blocks) * self._pool.block_size) for r in running)
        assert all(r.is_decoding for r in self._decoding.values())
        assert self._deadlines == {i: self._deadline(r, self._config.slo_of(r.priority)) for i, r in self._decoding.items()}
        assert self._next_due in (None, min(self._deadlines.values(), default=math.inf))
        assert list(self._next_rows.values()) == [(r, r.num_computed, r.num_computed + 1, True) for r in self._decoding.values()]
        assert self._decode_context == sum(r.num_tokens for r in self._decoding.values())
        assert self._need_page.keys() == {r.id for r in self._decoding.values() if not self._has_page(r)}

    def blocks_held(self) -> list[int]:
        return [b for r in self._requests.values() for b in r.blocks]

    # -------------------------------------------------------------------------------------------------------- internals
    def _class_of(self, request: Request) -> PriorityClass:
        if request.priority not in self._classes:
            self._classes[request.priority] = PriorityClass(self._config.slo_of(request.priority))
            self._order_classes()
        return self._classes[request.priority]

    def _order_classes(self) -> None:
        self._classes = dict(sorted(self._classes.items(), key=lambda item: item[1].slo.ttft))

    def _urgency(self, request: Request) -> tuple[float, float]:
        return self._config.slo_of(request.priority).ttft, request.arrival

    @staticmethod
    def _deadline(request: Request, slo: SLO) -> float:
        """When the next token is due: the first within `ttft` of arrival, each further one PACE x `tpot` later than the last was due."""
        if request.first_token_time is None:
            return request.arrival + slo.ttft
        return request.first_token_time + len(request.output_ids) * PACE * slo.tpot

    def _prefill_order(self, reclaim: Callable[[int], None], reclaimable: Callable[[], int]) -> Iterator[Request]:
        """Class by class: the prefills under way, then newcomers, each admitted when the caller comes to it."""
        for queue in self._classes.values():
            yield from tuple(queue.prefilling)
            while queue.waiting and not self.page_blocked and self.num_running < self._max_running:
                request = queue.waiting[0]
                blocks = self._pool.blocks_for(request.num_tokens)
                spare = self._watermark if self.num_running else 0  # so that the newcomer is not preempted at once
                if blocks + spare > self._pool.num_free + reclaimable():
                    self.page_blocked = True
                    break
                reclaim(blocks)
                queue.waiting.popleft()
                self.num_waiting -= 1
                request.blocks = self._pool.allocate(blocks, room=self._pool.blocks_for(request.max_len))
                request.status = RequestStatus.RUNNING
                queue.prefilling.append(request)
                yield request

    def _has_page(self, request: Request) -> bool:
        return request.num_computed < len(request.blocks) * self._pool.block_size

    def _grow_all(self, reclaim: Callable[[int], None]) -> None:
        """A page for each next row that has none: from the pool, else from finetuning, else from whoever can best wait."""
        reclaim(len(self._need_page))
        while len(self._need_page) > self._pool.num_free:
            running = (r for r in self._requests.values() if r.status is RequestStatus.RUNNING)
            self._preempt(max(running, key=self._urgency))
        self._pool.extend([request.blocks for request in self._need_page.values()])
        self._need_page.clear()

    def _preempt(self, request: Request) -> None:
        """Recompute later: pages go back now, the prompt and the outputs so far will be prefilled again."""
        self._stop_running(request)
        request.status, request.num_computed = RequestStatus.WAITING, 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        waiting = self._class_of(request).waiting
        position = next((i for i, other in enumerate(waiting) if other.arrival > request.arrival), len(waiting))
        waiting.insert(position, request)
        self.num_waiting += 1

    def _stop_running(self, request: Request) -> None:
        if self._decoding.pop(request.id, None) is not None:
            self._decode_context -= request.num_tokens
            self._need_page.pop(request.id, None)
            self._next_rows.pop(request.id, None)
            self._deadlines.pop(request.id, None)
            self._next_due = None
        else:
            self._class_of(request).prefilling.remove(request)
        self._pool.free(request.blocks)
        request.blocks = []

    def _start_decoding(self, request: Request, now: float) -> None:
        if request.first_token_time is None:
            request.first_token_time = now
        self._class_of(request).prefilling.remove(request)
        self._decoding[request.id] = request
        self._decode_context += request.num_tokens


def _finish_reason(request: Request, token: int, num_tokens: int) -> FinishReason | None:
    """Why a request of so many tokens ends with `token`, the last of them; None if it goes on."""
    sampling = request.sampling
    if token in sampling.stop_token_ids or (token in request.eos_ids and not sampling.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_tokens >= request.max_len else None
