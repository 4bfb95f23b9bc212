"""A request that comes while an iteration finetunes waits for no more than a boundary; what was cut off is done another time, once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import (
    BackwardSlice,
    FinetuneJob,
    InferenceChunk,
    PlanFeatures,
    Request,
    SamplingParams,
    SaveLevel,
    Sequence,
    SlicePart,
    StepPlan,
    TokenWindow,
)
from flexllm.scheduler.latency import LINEAR, SEGMENTS, LatencyModel, features_of
from flexllm.simulate.cluster import fleet
from flexllm.simulate.iteration import Iteration
from flexllm.simulate.replica import Machine, Replica
from flexllm.simulate.simulator import simulate
from flexllm.simulate.workload import Arrival

LAYERS = 4
ROW, BACKWARD_ROW, STEP = 1e-3, 1e-3, 0.05  # seconds
T0 = 0.01
LATENCY = LatencyModel(
    {**dict.fromkeys(LINEAR, 0.0), "t0": T0, "backward_rows": BACKWARD_ROW, "optimizer_steps": STEP, "label_rows": 1e-4}, [ROW] * SEGMENTS
)
MACHINE = Machine(LATENCY, num_blocks=1024, finetune_bytes=1 << 20)


def make_job(lengths: list[int], **settings: int) -> FinetuneJob:
    levels = (SaveLevel("keep", 8), SaveLevel("segments", 2, cost=1.5, depth=2))
    return FinetuneJob("job", lengths, lengths, num_layers=LAYERS, levels=levels, **settings)


# ------------------------------------------------------------------------------------------------------------- one cut
JOB = make_job([100, 20])
WINDOW = Sequence(0, JOB, 0, 100)
BACK = Sequence(1, JOB, 1, 20, forward=20, layer=LAYERS - 1, row=20)
REQUEST = Request("r", [1] * 10, SamplingParams(), arrival=0.0)
PREFILL = (InferenceChunk(REQUEST, 0, 10, True),)
WINDOWS = (TokenWindow(WINDOW, 0, 80),)
SLICES = tuple(BackwardSlice(layer, (SlicePart(BACK, 0, 20),)) for layer in (3, 2, 1, 0))
START, FACTOR = 5.0, 2.0
INFERENCE_END = START + FACTOR * (T0 + 10 * ROW)
FORWARD_END = START + FACTOR * (T0 + 90 * ROW + 80e-4)
SLICE = FACTOR * 20 * BACKWARD_ROW


def begun(*parts: str) -> Iteration:
    everything = {"inference": PREFILL, "windows": WINDOWS, "backward": SLICES, "optimizer_steps": (JOB,)}
    plan = StepPlan(**{part: everything[part] for part in parts})  # type: ignore[arg-type]
    return Iteration.begin(plan, START, FACTOR, LATENCY)


def test_windows_stop_after_the_layer_under_way_and_inference_goes_on_alone():
    whole = begun("inference", "windows", "backward", "optimizer_steps")
    for layer in range(LAYERS):
        share = (layer + 1) / LAYERS
        cut = whole.interrupted(START + (share - 0.1) * (FORWARD_END - START), LATENCY, 0.0)
        assert cut.plan == StepPlan(inference=PREFILL, interrupted=True, suspended=((WINDOWS[0], layer + 1),))
        assert cut.end == pytest.approx(share * FORWARD_END + (1 - share) * INFERENCE_END)
    without = begun("windows").interrupted(START + 1e-6, LATENCY, 0.0)
    assert without.plan == StepPlan(interrupted=True, suspended=((WINDOWS[0], 1),))
    assert without.end == pytest.approx(START + FACTOR * (T0 + 80 * ROW + 80e-4) / LAYERS)


@pytest.mark.parametrize("forward", [("inference", "windows"), ("inference",)])
def test_backward_stops_after_the_slice_under_way(forward: tuple[str, ...]):
    whole = begun(*forward, "backward", "optimizer_steps")
    done = FORWARD_END if "windows" in forward else INFERENCE_END
    for slices in range(1, 5):
        cut = whole.interrupted(done + (slices - 0.5) * SLICE, LATENCY, 0.0)
        assert cut.plan == replace(whole.plan, backward=SLICES[:slices], optimizer_steps=(), interrupted=True)
        assert cut.end == pytest.approx(done + slices * SLICE)
    in_step = done + 4.1 * SLICE
    assert whole.interrupted(in_step, LATENCY, 0.0) is whole


def test_backward_behind_inference_alone_is_not_begun():
    cut = begun("inference", "backward").interrupted(INFERENCE_END - 1e-3, LATENCY, 0.0)
    assert cut.plan == StepPlan(inference=PREFILL, interrupted=True)
    assert cut.end == pytest.approx(INFERENCE_END)


def test_nothing_changes_where_there_is_nothing_to_leave_out():
    inference = begun("inference")
    assert inference.interrupted(INFERENCE_END - 1e-3, LATENCY, 0.0) is inference
    backward = begun("backward")
    assert backward.interrupted(backward.end - 1e-3, LATENCY, 0.0) is backward
    cut = begun("inference", "windows", "backward").interrupted(START + 1e-3, LATENCY, 0.0)
    assert cut.interrupted(START + 2e-3, LATENCY, 0.0) is cut


# ------------------------------------------------------------------------------------------------------- whole runs
ARRIVALS = st.builds(Arrival, st.floats(0.0, 10.0, allow_subnormal=False), st.integers(1, 300), st.integers(1, 12))
TRACES = st.lists(ARRIVALS, min_size=1, max_size=25).map(lambda trace: sorted(trace, key=lambda a: a.time))
JOBS = st.builds(make_job, st.lists(st.integers(1, 300), min_size=1, max_size=6), group_size=st.integers(1, 3), epochs=st.integers(1, 2))
CONFIGS = st.builds(
    SchedulerConfig,
    mode=st.sampled_from(["coserve", "coserve", "temporal"]),
    slo=st.sampled_from([SLO(2.0, 0.1), SLO(20.0, 1.0)]),
    idle_slice=st.sampled_from([0.02, 0.5, 3.0]),
    temporal_inference_steps=st.sampled_from([0, 2]),
)
LONG = 1000.0  # seconds: enough for any of the jobs


def unit_seconds(iteration: Iteration) -> float:
    """At most this long a newcomer waits for the end of what runs: the inference rows, and a layer, a slice or the optimizer steps."""

    def seconds(plan: StepPlan) -> float:
        return iteration.factor * LATENCY.predict(features_of(plan))

    plan = iteration.plan
    layer = seconds(replace(plan, backward=(), optimizer_steps=())) / LAYERS
    slices = [seconds(StepPlan(backward=(item,))) for item in plan.backward]
    steps = iteration.factor * LATENCY.predict(PlanFeatures(optimizer_steps=len(plan.optimizer_steps)))
    return seconds(StepPlan(inference=plan.inference)) + max([layer, *slices, steps])


def test_windows_go_on_if_they_end_within_the_patience():
    whole = begun("inference", "windows", "backward")
    half = 0.5 * (FORWARD_END - START)
    cut = whole.interrupted(START + half, LATENCY, patience=1.01 * half)
    assert (cut.plan.windows, cut.plan.backward) == (whole.plan.windows, ())
    assert cut.end == pytest.approx(FORWARD_END)
    at_once = whole.interrupted(START + half, LATENCY, patience=0.99 * half)
    assert not at_once.plan.windows
    assert at_once.end < FORWARD_END


@settings(max_examples=60, deadline=None)
@given(trace=TRACES, job=JOBS, config=CONFIGS, noise=st.sampled_from([0.0, 0.3]))
def test_a_newcomer_waits_for_a_boundary_and_all_work_is_done_once(
    trace: list[Arrival], job: FinetuneJob, config: SchedulerConfig, noise: float
):
    replica = Replica(MACHINE, config, [job], seconds=LONG, noise=noise, check=True)
    records, longest = [], 0.0
    for number, arrival in enumerate(trace):
        while replica.now < arrival.time and replica.step():
            pass
        if replica.under_way is None:
            longest = 0.0
        elif not replica.under_way.plan.interrupted:  # else it was cut at a boundary of what is known already
            longest = unit_seconds(replica.under_way)
        records.append(replica.add(number, arrival))
        assert 0.0 <= replica.now - arrival.time <= longest + config.patience + 1e-9
    replica.finish()
    assert all(r.finished and r.first > r.arrival for r in records)
    assert replica.scheduler.jobs == [], "every step of the job is done"
    assert replica.finetune_tokens == pytest.approx(job.epochs * sum(job.lengths))
    assert sum(replica.busy.values()) <= LONG

    again = simulate(trace, [job], config, MACHINE, seconds=LONG, noise=noise)
    assert (again.records, again.iterations) == (records, replica.iterations)


@settings(max_examples=20, deadline=None)
@given(trace=TRACES, job=JOBS, config=CONFIGS)
def test_replicas_go_on_when_a_request_says_so(trace: list[Arrival], job: FinetuneJob, config: SchedulerConfig):
    result = simulate(trace, [job], fleet(config.mode, 3, config), MACHINE, seconds=LONG, noise=0.2, check=True)
    assert all(r.finished for r in result.records)
    assert result.finetune_tokens == pytest.approx(3 * job.epochs * sum(job.lengths))


def test_tokens_come_sooner_for_it():
    """A long window is under way when the request comes: without giving way it would wait for the rest of it."""
    (record,) = simulate(
        [Arrival(0.1, 10, 1)], [make_job([300])], SchedulerConfig(slo=SLO(0.1, 0.1), idle_slice=3.0), MACHINE, seconds=LONG
    ).records
    window = T0 + 300 * (ROW + 1e-4)
    assert record.ttft < 0.5 * (window - 0.1)
