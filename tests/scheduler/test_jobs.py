from dataclasses import replace

import pytest

from flexllm.config import SLO
from flexllm.core import JobStatus, StepResult, TokenWindow
from flexllm.scheduler.jobs import epoch_order
from tests.scheduler.fake import LAYERS, LOWEST, FakeEngine, expected_steps, make_job, make_request, simple_model


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    first = epoch_order(0, 0, 50, shuffle=True)
    assert sorted(first) == list(range(50))
    assert first == epoch_order(0, 0, 50, shuffle=True)
    assert len({tuple(first), tuple(epoch_order(0, 1, 50, True)), tuple(epoch_order(1, 0, 50, True)), tuple(range(50))}) == 4
    assert epoch_order(3, 2, 5, shuffle=False) == [0, 1, 2, 3, 4]


def test_a_job_from_start_to_end():
    engine = FakeEngine()
    job = make_job("j", [5, 17, 9, 30, 12], epochs=2)
    engine.scheduler.add_job(job)
    assert job.status is JobStatus.QUEUED
    engine.step()
    assert job.status is JobStatus.RUNNING
    engine.run()
    assert (job.status, job.step, engine.scheduler.jobs) == (JobStatus.SUCCEEDED, 6, [])
    assert engine.steps["j"] == expected_steps(job)
    assert (engine.pool.num_used, engine.budget.used) == (0, 0)


def test_max_steps_ends_a_job_early():
    engine = FakeEngine()
    job = make_job("j", [5] * 10, max_steps=3)
    engine.scheduler.add_job(job)
    engine.run()
    assert engine.steps["j"] == expected_steps(job)
    assert len(engine.steps["j"]) == 3


def test_a_resumed_job_goes_on_where_it_was():
    engine = FakeEngine()
    job = make_job("j", [5, 6, 7, 8, 9, 10], epochs=2, step=4)
    engine.scheduler.add_job(job)
    engine.run()
    assert engine.steps["j"] == expected_steps(job, first=4)


def test_a_job_with_nothing_left_to_do_succeeds_at_once():
    engine = FakeEngine()
    job = make_job("j", [5], step=1)
    engine.scheduler.add_job(job)
    assert (job.status, engine.scheduler.has_work) == (JobStatus.SUCCEEDED, False)


@pytest.mark.parametrize(("eval_every", "passes"), [(None, [3, 6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_validation_passes_come_between_steps(eval_every, passes):
    engine = FakeEngine()
    job = make_job("j", [8] * 6, epochs=2, valid_lengths=[30, 5, 9], eval_every=eval_every)
    engine.scheduler.add_job(job)
    engine.run()
    assert job.status is JobStatus.SUCCEEDED
    assert [step for step, _ in engine.validations["j"]] == [step for step in passes for _ in range(3)]
    for plan in engine.plans:
        assert len({w.sequence.train for w in plan.windows}) <= 1
        if any(not w.sequence.train for w in plan.windows):
            assert not plan.backward
            assert not plan.optimizer_steps


def test_forward_and_backward_of_a_group_share_iterations():
    engine = FakeEngine(idle_slice=0.05, max_window_rows=40)
    engine.scheduler.add_job(make_job("j", [40] * 4, group_size=4))
    engine.run()
    assert any(plan.windows and plan.backward for plan in engine.plans)
    assert len(engine.steps["j"]) == 1


def test_short_sequences_go_down_together():
    engine = FakeEngine(num_blocks=200, idle_slice=1.0)
    engine.scheduler.add_job(make_job("j", [20] * 8, group_size=8))
    engine.run()
    slices = [item for plan in engine.plans for item in plan.backward]
    assert [(item.layer, item.rows, len(item.parts)) for item in slices] == [(2, 160, 8), (1, 160, 8)]


def test_those_behind_come_level_before_all_go_on():
    latency = simple_model(row=1e-5, backward_rows=1e-3)  # an iteration: a window of one sequence, a layer of another
    engine = FakeEngine(latency=latency, idle_slice=0.03, max_window_rows=20, num_blocks=200)
    engine.scheduler.add_job(make_job("j", [20, 20, 20], group_size=3, shuffle=False))
    engine.run()
    slices = [(item.layer, [(p.sequence.example, p.rows) for p in item.parts]) for plan in engine.plans for item in plan.backward]
    assert slices == [
        (2, [(0, 20)]),
        (2, [(1, 20)]),
        (2, [(2, 20)]),
        (1, [(0, 20), (1, 10)]),
        (1, [(1, 10), (2, 20)]),
    ]


def cut_slices(engine: FakeEngine) -> list[int]:
    """Rows of the backward slices, beside requests, that left rows of their layer for later."""
    return [p.rows for plan in engine.plans if plan.inference for item in plan.backward for p in item.parts if p.start > 0]


def test_a_slice_waits_for_the_slack_it_needs():
    latency = simple_model(t0=0.01, row=1e-4, backward_rows=1e-3)  # 8 forward and 37 backward rows or so per token
    engine = FakeEngine(latency=latency, num_blocks=100, slo=SLO(ttft=100, tpot=0.05))
    engine.scheduler.add_job(make_job("j", [200], group_size=1))
    engine.add_request(make_request("r", prompt=20, output=100))
    engine.run()
    assert sum(len(plan.backward) for plan in engine.plans if plan.inference) == LAYERS - LOWEST
    assert not cut_slices(engine)
    assert engine.steps["j"] == [[0]]


def test_a_slice_that_never_fits_is_cut():
    latency = simple_model(t0=0.01, row=1e-4, backward_rows=1e-3)
    engine = FakeEngine(latency=latency, num_blocks=100, slo=SLO(ttft=100, tpot=0.05), idle_slice=0.05)
    engine.scheduler.add_job(make_job("j", [200], group_size=1))
    engine.add_request(make_request("r", prompt=20, output=100))
    engine.run()
    cut = cut_slices(engine)
    assert len(cut) > 4
    assert set(cut) == {50}  # what idle_slice allows
    assert engine.steps["j"] == [[0]]


def test_beside_requests_finetuning_gets_half_a_second_at_most():
    engine = FakeEngine(num_blocks=400, latency=simple_model(row=1e-2, t0=1e-3), idle_slice=2.0, slo=SLO(ttft=1e6, tpot=100.0))
    engine.scheduler.add_job(make_job("j", [190] * 4, group_size=1))
    assert engine.step().window_rows == 190
    engine.add_request(make_request("r", 5, 20, engine.now))
    plans = [engine.step() for _ in range(20)]
    assert max(plan.window_rows for plan in plans if plan.inference) == 50


def test_an_optimizer_step_beyond_idle_slice_takes_the_slack():
    latency = simple_model(t0=0.01, row=1e-4, backward_rows=1e-4, optimizer_steps=0.3)
    engine = FakeEngine(latency=latency, num_blocks=100, slo=SLO(ttft=100, tpot=0.05), idle_slice=0.1)
    engine.scheduler.add_job(make_job("j", [20] * 3, group_size=1))
    engine.add_request(make_request("r", prompt=20, output=100))
    engine.run()
    steps = [plan for plan in engine.plans if plan.optimizer_steps]
    assert [bool(plan.inference) for plan in steps] == [True, True, True]
    assert not any(plan.windows or plan.backward for plan in steps)
    assert all(plan.predicted <= plan.slack for plan in steps)


def test_an_iteration_with_room_for_five_rows_has_five():
    latency = simple_model(t0=0.01, row=1e-6, backward_rows=1e-3)
    engine = FakeEngine(latency=latency, num_blocks=100, slo=SLO(ttft=1e9, tpot=1e6), idle_slice=0.0055)
    engine.scheduler.add_job(make_job("j", [100], group_size=1))
    engine.add_request(make_request("r", prompt=4, output=60))
    rows = [engine.step().backward_rows for _ in range(8)]
    assert rows == [0, 0, 5, 5, 5, 5, 5, 5]


def test_late_requests_leave_nothing_to_finetuning():
    engine = FakeEngine(slo=SLO(ttft=0.001, tpot=0.001))
    engine.scheduler.add_job(make_job("j", [10, 10]))
    engine.add_request(make_request("r", output=20))
    engine.step()
    while engine.scheduler.num_running:
        assert engine.plans[-1].window_rows + engine.plans[-1].backward_rows == 0
        engine.step()
    assert engine.scheduler.starved_iterations == 20
    engine.run()
    assert len(engine.steps["j"]) == 1


def test_a_newcomer_waits_no_longer_than_the_idle_slice():
    engine = FakeEngine(num_blocks=500, idle_slice=0.05)
    engine.scheduler.add_job(make_job("j", [300] * 4, group_size=2))
    engine.run()
    assert max(plan.predicted for plan in engine.plans) <= 0.05
    engine.scheduler.add_job(make_job("k", [300] * 4, group_size=2))
    engine.add_request(make_request("r", output=200))
    engine.run()
    assert max(plan.predicted for plan in engine.plans if plan.inference) <= 0.05 + 0.02


def test_an_idle_engine_makes_progress_whatever_the_model_believes():
    engine = FakeEngine(idle_slice=1e-6)
    engine.scheduler.add_job(make_job("j", [40, 40]))
    engine.run()
    assert engine.steps["j"] == [[0, 1]]


def test_an_optimizer_step_waits_until_the_slack_has_room():
    latency = simple_model(t0=0.01, row=1e-4, backward_rows=1e-4, optimizer_steps=0.3)
    engine = FakeEngine(latency=latency, slo=SLO(ttft=100, tpot=0.05))
    engine.scheduler.add_job(make_job("j", [4], group_size=1))
    engine.add_request(make_request("r", output=8))  # done before it has 0.3 s to spare
    while engine.scheduler.num_running or engine.scheduler.num_waiting:
        assert not engine.step().optimizer_steps
    engine.run()
    assert engine.steps["j"] == [[0]]


def test_time_is_shared_by_weight():
    engine = FakeEngine(num_blocks=400, idle_slice=0.05)
    heavy, light = make_job("heavy", [40] * 400, weight=3.0), make_job("light", [40] * 400, weight=1.0)
    engine.scheduler.add_job(heavy)
    engine.scheduler.add_job(light)
    for _ in range(600):
        engine.step()
    assert heavy.step / light.step == pytest.approx(3.0, rel=0.15)


def test_only_time_that_did_something_counts():
    """What is left undone for a newcomer is no job's share: here two of the windows' three layers, then all slices but the first."""
    engine = FakeEngine(num_blocks=400, idle_slice=1.0)
    job = make_job("j", [64] * 4, group_size=4)
    engine.scheduler.add_job(job)
    scheduler = engine.scheduler
    plan = scheduler.schedule(engine.now)
    assert plan.windows
    scheduler.update(plan.cut(suspended=tuple((w, 0) for w in plan.windows)), StepResult({}, end=0.1))
    assert job.served == 0
    assert scheduler.schedule(engine.now) == plan, "nothing was done"
    scheduler.update(plan.cut(suspended=tuple((w, 1) for w in plan.windows)), StepResult({}, end=0.1))
    assert 0.2 * plan.predicted < job.served < 0.4 * plan.predicted
    while not (plan := scheduler.schedule(engine.now)).backward:
        scheduler.update(plan, StepResult({}, end=plan.predicted))
    before, whole = job.served, plan.predicted
    assert len(plan.backward) > 1
    scheduler.update(plan.cut(plan.windows, plan.backward[:1]), StepResult({}, end=0.1))
    assert 0 < job.served - before < 0.8 * whole


@pytest.mark.parametrize(("length", "windows"), [(190, [64, 64, 62]), (200, [69, 69, 62])])
def test_windows_are_cut_to_numbers_of_rows_that_recur(length: int, windows: list[int]):
    """GEMMs of other numbers need code of their own; but not for the price of another window."""
    engine = FakeEngine(num_blocks=400, latency=simple_model(row=1e-3, t0=1e-3), idle_slice=0.07)
    engine.scheduler.add_job(make_job("j", [length], group_size=1))
    assert [engine.step().window_rows for _ in windows] == windows


def test_rows_beside_a_window_count_too():
    engine = FakeEngine(num_blocks=400, latency=simple_model(row=1e-3, t0=1e-3), idle_slice=0.07, slo=SLO(ttft=1e6, tpot=1.0))
    engine.add_request(make_request("r", 5, 20, engine.now))
    engine.step()
    engine.scheduler.add_job(make_job("j", [180], group_size=1))
    plan = engine.step()
    assert (plan.inference_rows, plan.window_rows) == (1, 63)


def interrupted_window() -> tuple[FakeEngine, TokenWindow]:
    """A window of 64 rows that a newcomer stopped behind the first of three layers."""
    engine = FakeEngine(num_blocks=400, latency=simple_model(row=1e-3, t0=1e-3), idle_slice=1.0)
    engine.scheduler.add_job(make_job("j", [64], group_size=1))
    plan = engine.step(cut=lambda plan: plan.cut(suspended=tuple((w, 1) for w in plan.windows)))
    ((window, _),) = plan.suspended
    return engine, window


def test_an_interrupted_window_goes_on_where_it_was():
    engine, window = interrupted_window()
    plan = engine.step()
    assert plan.windows == (replace(window, layer=1),)
    assert plan.predicted == pytest.approx(44e-3), "two thirds of 64 rows"
    assert window.sequence.forward == 64


def test_an_interrupted_window_goes_on_by_parts_when_its_rest_fits_no_more():
    engine, window = interrupted_window()
    engine.reconfigure(idle_slice=0.03)
    assert engine.step().windows == (replace(window, end=40, layer=1),), "as many rows as fit"
    assert window.sequence.under_way == replace(window, start=40, layer=1)
    again = engine.step(cut=lambda plan: plan.cut(suspended=tuple((w, 2) for w in plan.windows)))
    assert again.suspended == ((replace(window, start=40, layer=1), 2),)
    assert engine.step().windows == (replace(window, start=40, layer=2),)
    assert window.sequence.under_way is None
    engine.run()
    assert engine.steps["j"] == [[0]]


def test_an_interrupted_part_is_again_where_the_others_are():
    engine, window = interrupted_window()
    engine.reconfigure(idle_slice=0.03)
    engine.step(cut=lambda plan: plan.cut(suspended=tuple((w, 2) for w in plan.windows)))
    assert window.sequence.under_way == replace(window, layer=1)
    engine.run()
    assert engine.steps["j"] == [[0]]


def test_an_interrupted_window_is_lost_with_its_pages():
    engine, window = interrupted_window()
    engine.scheduler.pause_job("j")
    engine.step()
    assert window.sequence.under_way is None
    engine.scheduler.resume_job("j")
    assert [w.layer for w in engine.step().windows] == [0]


def test_tenants_share_equally_however_many_jobs_they_have():
    engine = FakeEngine(num_blocks=800, idle_slice=0.05)
    many = [make_job(f"many{i}", [40] * 400, tenant="many", weight=1.0 + i) for i in range(2)]
    one = make_job("one", [40] * 400, tenant="one")
    for job in (*many, one):
        engine.scheduler.add_job(job)
    for _ in range(900):
        engine.step()
    assert many[0].step + many[1].step == pytest.approx(one.step, rel=0.15)
    assert many[1].step / many[0].step == pytest.approx(2.0, rel=0.2)


def test_a_tenant_that_comes_later_has_no_claim_on_the_past():
    engine = FakeEngine(num_blocks=800, idle_slice=0.05)
    first, second = make_job("first", [40] * 400, tenant="a"), make_job("second", [40] * 400, tenant="b")
    engine.scheduler.add_job(first)
    for _ in range(300):
        engine.step()
    before = first.step
    engine.scheduler.add_job(second)
    for _ in range(600):
        engine.step()
    assert second.step == pytest.approx(first.step - before, rel=0.15)


def test_a_latecomer_has_no_claim_on_the_past():
    engine = FakeEngine(num_blocks=400)
    first, second = make_job("first", [40] * 400), make_job("second", [40] * 400)
    engine.scheduler.add_job(first)
    for _ in range(200):
        engine.step()
    engine.scheduler.add_job(second)
    before = first.step
    for _ in range(100):
        engine.step()
    assert first.step - before == pytest.approx(second.step, abs=3)


def test_finetuning_gives_pages_back_before_a_request_is_preempted():
    engine = FakeEngine(num_blocks=20, block_size=4, slo=SLO(ttft=1e6, tpot=1e6), max_window_rows=16)
    job = make_job("j", [40], group_size=1)
    engine.scheduler.add_job(job)
    engine.step()
    assert job.group[0].forward == 16
    requests = [make_request(f"r{i}", prompt=36, output=4) for i in range(2)]
    for request in requests:
        engine.add_request(request)
    plan = engine.step()
    assert plan.released == tuple(job.group)
    assert plan.restarted == ()
    assert not plan.windows
    engine.run()
    assert [r.num_preemptions for r in requests] == [0, 0]
    assert engine.steps["j"] == [[0]]


def test_a_group_in_backward_starts_over_as_a_whole():
    latency = simple_model(t0=0.001, row=1e-4, backward_rows=1e-3)
    loose = SLO(ttft=1e6, tpot=1e6)
    engine = FakeEngine(latency=latency, num_blocks=20, block_size=4, slo=loose, idle_slice=0.02, max_sequences=1)
    job = make_job("j", [4, 40], group_size=2, shuffle=False)
    engine.scheduler.add_job(job)
    while not job.group or not job.group[1].backward_begun:
        engine.step()
    assert job.group[0].done
    group = list(job.group)
    for i in range(2):
        engine.add_request(make_request(f"r{i}", prompt=36, output=4))
    plan = engine.step()
    assert set(plan.released) == set(group)
    assert plan.restarted == (job,)
    assert job.group == group
    assert all(q.forward == 0 and q.layer == LAYERS - 1 and q.row == q.length for q in group)
    engine.run()
    assert engine.steps["j"] == [[0, 1]]


def test_a_paused_job_gives_its_memory_back_and_repeats_the_step():
    engine = FakeEngine(idle_slice=0.02)
    job = make_job("j", [30, 30, 30], group_size=3)
    engine.scheduler.add_job(job)
    while not any(q.backward_begun for q in job.group):
        engine.step()
    engine.scheduler.pause_job("j")
    plan = engine.step()
    assert plan.restarted == (job,)
    assert plan.window_rows + plan.backward_rows == 0
    assert (job.status, engine.pool.num_used, engine.budget.used) == (JobStatus.PAUSED, 0, 0)
    assert not engine.scheduler.has_work
    engine.scheduler.resume_job("j")
    engine.run()
    assert engine.steps["j"] == [[0, 1, 2]]


def test_what_is_released_is_said_until_a_plan_runs():
    engine = FakeEngine(idle_slice=0.02)
    job = make_job("j", [30], group_size=1)
    engine.scheduler.add_job(job)
    engine.step()
    engine.scheduler.pause_job("j")
    lost = engine.scheduler.schedule(engine.now)
    assert lost.released == tuple(job.group)
    assert not lost.is_empty
    assert engine.step().released == lost.released
    assert engine.step().released == ()


def test_only_known_jobs_are_paused_and_resumed():
    scheduler = FakeEngine().scheduler
    with pytest.raises(ValueError, match="unknown job 'j'; unfinished jobs: none"):
        scheduler.pause_job("j")
    with pytest.raises(ValueError, match="unknown job 'j'"):
        scheduler.resume_job("j")


def test_a_cancelled_job_returns_what_is_in_flight():
    engine = FakeEngine(idle_slice=0.02)
    job = make_job("j", [30, 30])
    engine.scheduler.add_job(job)
    while not any(q.backward_begun for q in job.group):
        engine.step()
    flying = [q for q in job.group if q.blocks]
    assert flying
    assert engine.scheduler.remove_job("j") == flying
    assert engine.scheduler.remove_job("j") == []
    engine.scheduler.check_integrity()
    assert (engine.pool.num_used, engine.budget.used, engine.scheduler.has_work) == (0, 0, False)


def test_a_job_cancelled_during_the_iteration_is_not_heard_of_again():
    engine = FakeEngine()
    job = make_job("j", [30, 30])
    engine.scheduler.add_job(job)
    engine.step(between=lambda: engine.remove_job("j"))
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_work


def test_a_sequence_that_could_never_be_held_is_refused():
    engine = FakeEngine(num_blocks=10, block_size=4, finetune_bytes=250)
    with pytest.raises(ValueError, match="an example of 50 tokens does not fit in the K/V cache: 16 tokens short"):
        engine.scheduler.add_job(make_job("j", [5, 50]))
    with pytest.raises(ValueError, match="an example of 37 tokens does not fit in the K/V cache: 4 tokens short"):
        engine.scheduler.add_job(make_job("j", [5], valid_lengths=[37]))
    with pytest.raises(ValueError, match="an example of 30 tokens do not fit in the finetuning memory: 50 bytes short"):
        engine.scheduler.add_job(make_job("j", [5, 30]))
    engine.scheduler.add_job(make_job("j", [5, 25], valid_lengths=[36]))
    with pytest.raises(ValueError, match="'j' is in use"):
        engine.scheduler.add_job(make_job("j", [5]))
    engine.run()
    assert engine.steps["j"] == [[0, 1]]


def test_backward_stops_at_the_lowest_adapted_layer():
    engine = FakeEngine()
    engine.scheduler.add_job(make_job("j", [9], group_size=1))
    engine.run()
    assert {item.layer for plan in engine.plans for item in plan.backward} == set(range(LOWEST, LAYERS))
