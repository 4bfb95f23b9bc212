"""An engine without a model: it runs plans on a virtual clock and checks that each could be run for real."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob, Request, SamplingParams, SaveLevel, StepPlan, StepResult, TokenLogprob, TokenOutput, TokenWindow
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget
from flexllm.scheduler.jobs import epoch_order
from flexllm.scheduler.latency import LINEAR, SEGMENTS, LatencyModel, features_of
from flexllm.scheduler.scheduler import HybridTokenScheduler

LAYERS, LOWEST = 3, 1


def make_request(request_id: str, prompt: int = 8, output: int = 4, arrival: float = 0.0, **late: Any) -> Request:
    return Request(request_id, list(range(1, prompt + 1)), SamplingParams(max_tokens=output), arrival, **late)


def make_job(job_id: str, lengths: list[int], **settings: Any) -> FinetuneJob:
    settings = {"group_size": 2, "num_layers": LAYERS, "lowest_layer": LOWEST, "levels": (SaveLevel("recompute", 10),), **settings}
    return FinetuneJob(job_id, lengths, list(lengths), **settings)


def expected_token(request: Request, position: int) -> int:
    """What the pretended model says at a position: a function of the prompt and the position alone."""
    return (len(request.prompt_ids) * 31 + position * 7) % 97 + 1


def expected_steps(job: FinetuneJob, first: int = 0) -> list[list[int]]:
    """The examples of each optimizer step from `first` on."""
    steps = []
    for step in range(first, job.total_steps):
        epoch, index = divmod(step, job.steps_per_epoch)
        order = epoch_order(job.seed, epoch, len(job.lengths), job.shuffle)
        steps.append(sorted(order[index * job.group_size : (index + 1) * job.group_size]))
    return steps


class FakeEngine:
    """Scheduler, clock and pretended model. `noise()` multiplies the predicted time of an iteration."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        finetune_bytes: int = 100_000,
        noise: Callable[[], float] = lambda: 1.0,
        latency: LatencyModel | None = None,
        **settings: Any,
    ) -> None:
        self.config = SchedulerConfig(**{"slo": SLO(ttft=10.0, tpot=1.0), **settings})
        self.pool = BlockPool(num_blocks, block_size)
        self.budget = ByteBudget(finetune_bytes)
        self.latency = latency or LatencyModel.default()
        self.scheduler = HybridTokenScheduler(self.config, self.pool, self.latency, self.budget)
        self.now = 0.0
        self.noise = noise
        self.plans: list[StepPlan] = []
        self.outputs: dict[str, list[TokenOutput]] = defaultdict(list)
        self.steps: dict[str, list[list[int]]] = defaultdict(list)  # the examples of each optimizer step, by job
        self.validations: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (step, example), by job
        self.requests: dict[str, Request] = {}
        self._computed: dict[str, int] = {}
        self._forward: dict[int, int] = {}
        self._under_way: dict[int, TokenWindow] = {}  # from the layers that they reached
        self._staircase: dict[int, list[int]] = {}  # lowest row done at each layer
        self._ledger: dict[str, list[int]] = defaultdict(list)  # examples whose gradients are in

    def holds(self, job: FinetuneJob) -> bool:
        """Whether every sequence of the job could be held when nothing else is."""
        longest = max([*job.lengths, *job.valid_lengths])
        fits = self.pool.blocks_for(longest) + 1 <= self.pool.num_blocks
        return fits and max(job.lengths) * min(level.bytes_per_token for level in job.levels) <= self.budget.total

    # --------------------------------------------------------------------------------------------------------- commands
    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)
        self.requests[request.id] = request

    def abort(self, request_id: str) -> None:
        self.scheduler.abort_request(request_id)
        self.requests.pop(request_id)

    def remove_job(self, job_id: str) -> None:
        for sequence in self.scheduler.remove_job(job_id):
            self._drop(sequence.id)
        self._ledger.pop(job_id, None)

    def reconfigure(self, **settings: Any) -> None:
        self.config = replace(self.config, **settings)
        self.scheduler.reconfigure(self.config)

    # -------------------------------------------------------------------------------------------------------- iterations
    def step(self, between: Callable[[], None] = lambda: None, cut: Callable[[StepPlan], StepPlan] | None = None) -> StepPlan:
        """One iteration; `between` runs after the plan is made and before its result is booked, `cut` says what of it is done
        (None: all)."""
        decoding = {r.id for r in self.requests.values() if r.is_decoding}
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        assert abs(self.latency.predict(features_of(plan)) - plan.predicted) < 1e-9
        assert plan.features == pytest.approx(features_of(plan)), "what it was planned with is what is in it"
        self._check_deadlines(plan)
        if plan.inference:
            preempted = {r.id for r in self.requests.values() if r.num_computed == 0}  # and perhaps admitted again at once
            assert decoding - preempted <= {c.request.id for c in plan.inference if c.is_decode}, "a decoding request was left out"
        plan = cut(plan) if cut else plan
        tokens = self._run_inference(plan)
        self._run_finetuning(plan)
        end = self.now + max(plan.predicted * self.noise(), 1e-6)
        between()
        for output in self.scheduler.update(plan, StepResult(tokens, start=self.now, end=end)):
            self.outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                self.requests.pop(output.request_id)
        self.scheduler.check_integrity()
        self.now = end
        self.plans.append(plan)
        return plan

    def run(self, limit: int = 5000) -> None:
        """Until there is nothing to do."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {limit} iterations: {self.requests.keys()}, {self.scheduler.jobs}")

    def _check_deadlines(self, plan: StepPlan) -> None:
        """Finetuning makes no token late that could be in time, and leaves alone those that are late already."""
        if not (plan.windows or plan.backward or plan.optimizer_steps) or self.config.mode == "finetune":
            return
        for request in self.requests.values():
            if request.first_token_time is None or self.config.mode == "temporal":
                continue
            slo = self.config.slo_of(request.priority)
            deadline = request.first_token_time + len(request.output_ids) * slo.tpot
            assert self.now + plan.predicted <= deadline, (plan.predicted, deadline - self.now)

    def _run_inference(self, plan: StepPlan) -> dict[str, TokenLogprob]:
        tokens = {}
        rows = 0
        for chunk in plan.inference:
            request = chunk.request
            assert chunk.start == (self._computed.get(request.id, 0) if chunk.start else 0), "a gap in the K/V cache"
            assert len(request.blocks) * self.pool.block_size >= chunk.end
            self._computed[request.id] = chunk.end
            rows += chunk.rows
            assert chunk.sample == (chunk.end == request.num_tokens)
            if chunk.sample:
                tokens[request.id] = TokenLogprob(expected_token(request, chunk.end), -1.0)
        assert rows <= self.config.max_batch_tokens
        decodes = [c.is_decode for c in plan.inference]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        return tokens

    def _run_finetuning(self, plan: StepPlan) -> None:
        for sequence in plan.released:
            self._drop(sequence.id)
        for job in plan.restarted:
            self._ledger[job.id].clear()
        forward_before = dict(self._forward)
        assert plan.window_rows <= self.config.max_window_rows
        for window in plan.windows:
            sequence = window.sequence
            assert window.start == self._forward.get(sequence.id, 0) < window.end <= sequence.length
            assert len(sequence.blocks) * self.pool.block_size >= window.end
            begun = self._go_on(window)
            if begun and window.end < begun.end:
                self._under_way[sequence.id] = replace(begun, start=window.end)
            self._forward[sequence.id] = window.end
            if window.end == sequence.length and not sequence.train:
                self.validations[sequence.job.id].append((sequence.job.step, sequence.example))
                self._drop(sequence.id)
        for window, layer in plan.suspended:
            assert window.start == self._forward.get(window.sequence.id, 0)
            begun = self._go_on(window)
            if begun and window.end < begun.end:  # a part stays with the others
                self._under_way[window.sequence.id] = begun
            elif layer:
                self._under_way[window.sequence.id] = replace(window, layer=layer)
        for item in plan.backward:
            assert len({part.sequence.job.id for part in item.parts}) == 1
            for part in item.parts:
                sequence = part.sequence
                assert forward_before[sequence.id] == sequence.length, "backward before the forward was done"
                stairs = self._staircase.setdefault(sequence.id, [sequence.length] * LAYERS)
                assert all(row == 0 for row in stairs[item.layer + 1 :]), "a layer above is not done"
                assert part.start < part.end == stairs[item.layer], "rows go last to first, without gaps"
                stairs[item.layer] = part.start
                if not any(stairs[LOWEST:]):
                    self._ledger[sequence.job.id].append(sequence.example)
                    self._drop(sequence.id)
        for job in plan.optimizer_steps:
            self.steps[job.id].append(sorted(self._ledger.pop(job.id)))

    def _go_on(self, window: TokenWindow) -> TokenWindow | None:
        """What of its sequence was under way: the window has to be that or the first rows of it."""
        begun = self._under_way.pop(window.sequence.id, None)
        assert window.layer == 0 if begun is None else window.end <= begun.end
        assert begun is None or window == replace(begun, end=window.end), "it goes on from another place than where it stopped"
        return begun

    def _drop(self, sequence_id: int) -> None:
        self._forward.pop(sequence_id, None)
        self._under_way.pop(sequence_id, None)
        self._staircase.pop(sequence_id, None)


def interruption(random: Random) -> Callable[[StepPlan], StepPlan]:
    """Cuts a plan somewhere: windows at any layer, the backward behind any slice."""

    def cut(plan: StepPlan) -> StepPlan:
        if plan.windows and random.random() < 0.7:
            return plan.cut(suspended=tuple((w, random.randint(w.layer, LAYERS)) for w in plan.windows))
        if plan.windows or plan.backward or plan.optimizer_steps:
            return plan.cut(plan.windows, plan.backward[: random.randint(0, len(plan.backward))])
        return plan

    return cut


def simple_model(row: float = 0.0, **coefficients: float) -> LatencyModel:
    """A latency model of `row` seconds per forward row, the given coefficients and nothing else."""
    return LatencyModel({name: coefficients.get(name, 0.0) for name in ("t0", *LINEAR)}, [row] * SEGMENTS)
