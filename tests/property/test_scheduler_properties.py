"""Whatever arrives, leaves, pauses, resumes or is cancelled, and however tight memory is: nothing is lost or done twice."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import count
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexllm.config import SLO
from flexllm.core import FinetuneJob, JobStatus, Request, StepPlan
from flexllm.scheduler.latency import features_of
from tests.scheduler.fake import FakeEngine, expected_steps, expected_token, interruption, make_job, make_request


class SchedulerMachine(RuleBasedStateMachine):
    """Requests and jobs come and go around iterations; `FakeEngine` checks each plan, `teardown` what came of all of them."""

    @initialize(
        num_blocks=st.sampled_from([12, 24, 40, 80, 160]),
        finetune_bytes=st.sampled_from([700, 100_000, 100_000]),
        mode=st.sampled_from(["coserve", "coserve", "coserve", "temporal", "inference", "finetune"]),
        tpot=st.sampled_from([0.02, 0.5, 100.0, 100.0]),
        max_batch_tokens=st.sampled_from([4, 16, 512]),
        max_sequences=st.integers(1, 6),
        idle_slice=st.sampled_from([0.005, 0.03, 0.1]),
        temporal_inference_steps=st.sampled_from([0, 3]),
        seed=st.integers(0, 1000),
    )
    def start(self, num_blocks: int, finetune_bytes: int, seed: int, tpot: float, **config: Any) -> None:
        random = Random(seed)

        def noise() -> float:
            return 10.0 if random.random() < 0.02 else random.uniform(0.8, 1.3)

        slos = {"slo": SLO(ttft=20 * tpot, tpot=tpot), "class_slos": {"batch": SLO(ttft=60.0, tpot=2.0)}}
        self.engine = FakeEngine(num_blocks, 4, finetune_bytes, noise, max_running=8, max_window_rows=24, **slos, **config)
        self.ids = count()
        self.reconfigured = False
        self.submitted: dict[str, Request] = {}
        self.jobs: dict[str, FinetuneJob] = {}

    @rule(
        prompts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
        output=st.integers(1, 24),
        priority=st.sampled_from(["interactive", "interactive", "batch"]),
    )
    def add_requests(self, prompts: list[int], output: int, priority: str) -> None:
        for prompt in prompts:
            request = make_request(f"r{next(self.ids)}", prompt, output, self.engine.now, priority=priority)
            fits = prompt < self.engine.pool.capacity
            try:
                self.engine.add_request(request)
                assert fits
                self.submitted[request.id] = request
            except ValueError:
                assert not fits

    @rule(data=st.data())
    def abort_request(self, data: st.DataObject) -> None:
        if self.engine.requests:
            self._abort(data.draw(st.sampled_from(sorted(self.engine.requests))))

    def _abort(self, request_id: str) -> None:
        if request_id in self.engine.requests:
            self.engine.abort(request_id)
            del self.submitted[request_id]

    @rule(
        lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8),
        valid_lengths=st.lists(st.integers(1, 20), max_size=2),
        group_size=st.integers(1, 4),
        epochs=st.integers(1, 2),
        weight=st.sampled_from([0.5, 1.0, 3.0]),
    )
    def add_job(self, lengths: list[int], **settings: Any) -> None:
        if len(self.jobs) >= 4:
            return
        job = make_job(f"j{next(self.ids)}", lengths, **settings)
        try:
            self.engine.scheduler.add_job(job)
            self.jobs[job.id] = job
        except ValueError:  # a sequence that could never be held
            assert not self.engine.holds(job)

    def _draw_job(self, data: st.DataObject) -> str | None:
        names = [job.id for job in self.engine.scheduler.jobs]
        return data.draw(st.sampled_from(names)) if names else None

    @rule(data=st.data())
    def pause_job(self, data: st.DataObject) -> None:
        if (job_id := self._draw_job(data)) is not None:
            self.engine.scheduler.pause_job(job_id)

    @rule(data=st.data())
    def resume_job(self, data: st.DataObject) -> None:
        if (job_id := self._draw_job(data)) is not None:
            self.engine.scheduler.resume_job(job_id)

    @rule(data=st.data())
    def cancel_job(self, data: st.DataObject) -> None:
        if (job_id := self._draw_job(data)) is not None:
            self._cancel(job_id)

    def _cancel(self, job_id: str) -> None:
        self.engine.remove_job(job_id)
        self.jobs.pop(job_id, None)

    @rule(iterations=st.integers(1, 12))
    def iterate(self, iterations: int) -> None:
        for _ in range(iterations):
            self.engine.step()

    @rule(
        mode=st.sampled_from(["coserve", "temporal", "inference", "finetune"]),
        tpot=st.sampled_from([0.02, 0.5, 100.0]),
        batch_ttft=st.sampled_from([0.1, 60.0]),
        max_window_rows=st.sampled_from([8, 24]),
    )
    def reconfigure(self, mode: str, tpot: float, batch_ttft: float, max_window_rows: int) -> None:
        slos = {"slo": SLO(ttft=20 * tpot, tpot=tpot), "class_slos": {"batch": SLO(ttft=batch_ttft, tpot=2.0)}}
        self.engine.reconfigure(mode=mode, max_window_rows=max_window_rows, **slos)
        self.reconfigured = True

    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        """A command arrives while an iteration runs, which a request may cut short too."""
        requests, jobs = sorted(self.engine.requests), [job.id for job in self.engine.scheduler.jobs]
        commands = [lambda: None]
        if requests:
            request_id = data.draw(st.sampled_from(requests))
            commands.append(lambda: self._abort(request_id))
        if jobs:
            job_id = data.draw(st.sampled_from(jobs))
            commands += [
                lambda: self.engine.scheduler.pause_job(job_id),
                lambda: self.engine.scheduler.resume_job(job_id),
                lambda: self._cancel(job_id),
            ]
        seed = data.draw(st.none() | st.integers(0, 1000))
        cut = None if seed is None else interruption(Random(seed))
        self.engine.step(data.draw(st.sampled_from(commands)), cut)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        if self.reconfigured:  # what another mode began is to end too
            engine.reconfigure(mode="coserve")
        for job in engine.scheduler.jobs:
            engine.scheduler.resume_job(job.id)
        engine.run(limit=30_000)
        assert engine.pool.num_free == engine.pool.num_blocks
        assert engine.budget.used == 0
        if engine.config.mode != "finetune":
            for request in self.submitted.values():
                produced = [output.token_id for output in engine.outputs[request.id]]
                first = len(request.prompt_ids)
                wanted = min(request.sampling.max_tokens, engine.pool.capacity - first)
                assert produced == [expected_token(request, first + i) for i in range(wanted)]
        if engine.config.mode != "inference":
            for job in self.jobs.values():
                assert job.status is JobStatus.SUCCEEDED
                assert engine.steps[job.id] == expected_steps(job)
                passes = {s for s in range(1, job.total_steps + 1) if s % job.steps_per_epoch == 0} if job.valid_lengths else set()
                assert sorted(engine.validations[job.id]) == [(s, e) for s in sorted(passes) for e in range(len(job.valid_lengths))]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_memory_pressure_never_loses_or_repeats_an_example(seed: int) -> None:
    """Bursts of requests interrupt groups in forward and in backward and take their pages, again and again."""
    random = Random(seed)
    engine = FakeEngine(40, 4, slo=SLO(ttft=1e6, tpot=1e6), idle_slice=0.02, max_window_rows=64, max_sequences=3)
    jobs = [make_job(f"j{i}", [random.randint(1, 70) for _ in range(8)], epochs=2, group_size=random.randint(1, 4)) for i in range(2)]
    for job in jobs:
        engine.scheduler.add_job(job)
    requests = []
    for _ in range(150):
        if random.random() < 0.1:
            requests.append(make_request(f"r{len(requests)}", random.randint(20, 100), random.randint(1, 30), engine.now))
            engine.add_request(requests[-1])
        engine.step(cut=interruption(random) if random.random() < 0.3 else None)
    engine.run()
    for request in requests:
        produced = [output.token_id for output in engine.outputs[request.id]]
        assert produced == [expected_token(request, p) for p in range(len(request.prompt_ids), request.num_tokens)]
        assert len(produced) == request.sampling.max_tokens
    for job in jobs:
        assert engine.steps[job.id] == expected_steps(job)


@settings(max_examples=8, deadline=None)
@given(weights=st.lists(st.floats(0.5, 3.0), min_size=2, max_size=4), idle_slice=st.floats(0.02, 0.03), seed=st.integers(0, 2**32))
def test_no_job_starves_and_time_goes_by_weight(weights: list[float], idle_slice: float, seed: int) -> None:
    """Jobs that could each use all the time, between requests: `served`, time by weight, stays within the few iterations of each
    other that a job needs to use a turn in full."""
    random = Random(seed)
    engine = FakeEngine(2000, 4, finetune_bytes=1 << 30, slo=SLO(ttft=1e6, tpot=1e6), idle_slice=idle_slice)
    jobs = [
        make_job(f"j{i}", [random.randint(150, 250) for _ in range(8)], epochs=10_000, group_size=random.randint(1, 4), weight=weight)
        for i, weight in enumerate(weights)
    ]
    for job in jobs:
        engine.scheduler.add_job(job)
    served, idle = [0.0] * len(jobs), [0] * len(jobs)
    for iteration in range(250):
        if random.random() < 0.05:
            engine.add_request(make_request(f"r{iteration}", random.randint(1, 60), random.randint(1, 60), engine.now))
        if _is_finetuning(engine.step()):
            for i, job in enumerate(jobs):
                idle[i] = idle[i] + 1 if job.served == served[i] else 0
                served[i] = job.served
                assert idle[i] <= 4 * sum(weights) / job.weight
        assert max(served) - min(served) <= 4 * idle_slice / min(weights)


@settings(max_examples=8, deadline=None)
@given(idle_slice=st.floats(0.03, 0.2), tpot=st.sampled_from([0.1, 1.0, 1e6]), seed=st.integers(0, 2**32))
def test_finetuning_delays_a_newcomer_by_the_idle_slice_at_most(idle_slice: float, tpot: float, seed: int) -> None:
    """A request that comes while an iteration runs is in the next one, and has waited for the inference of the one that ran, for
    `idle_slice` seconds of finetuning, and for what the prediction was off by."""
    random = Random(seed)
    noise = 1.0
    engine = FakeEngine(2000, 4, 1 << 30, lambda: noise, slo=SLO(ttft=1e6, tpot=tpot), idle_slice=idle_slice, max_running=64)
    for i in range(3):
        lengths = [random.randint(1, 120) for _ in range(8)]
        engine.scheduler.add_job(make_job(f"j{i}", lengths, epochs=10_000, group_size=random.randint(1, 4)))
    finetuning = 0
    for iteration in range(80):
        noise = random.uniform(0.8, 1.3)
        comes = random.random() < 0.1
        newcomer = make_request(f"r{iteration}", random.randint(1, 60), random.randint(1, 40), engine.now)
        before = deepcopy(engine.latency)
        plan = engine.step(partial(engine.add_request, newcomer) if comes else lambda: None)
        finetuning += _is_finetuning(plan)
        if comes:
            inference = before.predict(features_of(StepPlan(inference=plan.inference)))
            error = max(0.0, (noise - 1) * plan.predicted)
            assert engine.now - newcomer.arrival <= inference + idle_slice + error + 1e-9
            assert newcomer in [chunk.request for chunk in engine.step().inference]
    assert finetuning > 10


def _is_finetuning(plan: StepPlan) -> bool:
    return bool(plan.windows or plan.backward or plan.optimizer_steps)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_job_cancelled_and_taken_up_again_misses_and_repeats_nothing(seed: int) -> None:
    """Cancelled in mid-group, paused and robbed of its pages, then added anew at the optimizer step that was done last."""
    random = Random(seed)
    engine = FakeEngine(40, 4, slo=SLO(ttft=1e6, tpot=1e6), idle_slice=0.02, max_window_rows=32, max_sequences=3)
    shapes = [
        {"lengths": [random.randint(1, 70) for _ in range(6)], "group_size": random.randint(1, 4), "weight": random.uniform(0.5, 3)}
        for _ in range(2)
    ]
    jobs = {f"j{i}": make_job(f"j{i}", epochs=2, **shape) for i, shape in enumerate(shapes)}
    for job in jobs.values():
        engine.scheduler.add_job(job)
    for iteration in range(150):
        job_id, chance = random.choice(sorted(jobs)), random.random()
        unfinished = [job.id for job in engine.scheduler.jobs]
        if chance < 0.1:
            engine.add_request(make_request(f"r{iteration}", random.randint(20, 100), random.randint(1, 20), engine.now))
        elif job_id in unfinished and chance < 0.2:
            random.choice([engine.scheduler.pause_job, engine.scheduler.resume_job])(job_id)
        elif job_id in unfinished and chance < 0.25:
            engine.remove_job(job_id)
            jobs[job_id] = make_job(job_id, epochs=2, step=jobs[job_id].step, **shapes[int(job_id[1:])])
            engine.scheduler.add_job(jobs[job_id])
        engine.step()
    for job_id in [job.id for job in engine.scheduler.jobs]:
        engine.scheduler.resume_job(job_id)
    engine.run()
    for job in jobs.values():
        assert job.status is JobStatus.SUCCEEDED
        assert engine.steps[job.id] == expected_steps(job)
