"""What finetuning leaves unused for requests that are not here yet."""

from random import Random

import pytest

from flexllm.config import SLO
from flexllm.scheduler.headroom import MEMORY, Reserve
from tests.scheduler.fake import FakeEngine, make_job, make_request


def test_the_reserve_is_what_bursts_of_prompts_take_beyond_the_pace():
    reserve = Reserve()
    reserve.no_prompts()
    assert reserve.seconds == 0.0
    for _ in range(3):  # a prompt of three chunks
        reserve.prompts(0.06, pace=0.05)
    assert reserve.seconds == 0.0  # not over yet
    reserve.no_prompts()
    assert reserve.seconds == pytest.approx(0.03)
    for _ in range(MEMORY):  # prompts that fit into the pace
        reserve.prompts(0.04, pace=0.05)
        reserve.no_prompts()
    assert reserve.seconds == 0.0


def test_the_reserve_covers_what_iterations_took_beyond_their_prediction():
    reserve = Reserve()
    for overrun in [0.001] * 30 + [0.02] * 3 + [-0.01] * 30:
        reserve.overrun(overrun)
    assert reserve.seconds == 0.02
    for _ in range(MEMORY):
        reserve.overrun(-0.01)
    assert reserve.seconds == 0.0


def test_a_noisy_machine_makes_few_requests_late():
    """Iterations take up to half as long again as predicted; every request would end right at its deadline otherwise."""
    rng = Random(0)
    engine = FakeEngine(num_blocks=4000, slo=SLO(ttft=10.0, tpot=0.1), noise=lambda: 1.0 if rng.random() < 0.8 else rng.uniform(1.0, 1.5))
    engine.scheduler.add_job(make_job("j", [200] * 4000))
    late = []
    for i in range(60):
        request = make_request(f"r{i}", output=20, arrival=engine.now)
        engine.add_request(request)
        while len(request.output_ids) < 20:
            engine.step()
        late.append((request.last_token_time - request.first_token_time) / 19 > 0.1)
    assert sum(late[10:]) <= 1


def test_no_finetuning_while_requests_wait_for_others_to_end():
    engine = FakeEngine(num_blocks=400, max_running=2, slo=SLO(ttft=1000, tpot=1000))
    engine.scheduler.add_job(make_job("j", [40] * 40))
    for i in range(4):
        engine.add_request(make_request(f"r{i}", output=20))
    full = free = 0
    while engine.scheduler.num_running or engine.scheduler.num_waiting:
        waited = engine.scheduler.num_waiting
        plan = engine.step()
        if waited > 2 or engine.scheduler.num_waiting:
            full += 1
            assert plan.window_rows + plan.backward_rows == 0
        elif plan.window_rows or plan.backward_rows:
            free += 1
    assert full > 15
    assert free > 5


def test_running_requests_stay_ahead_by_what_prompts_put_them_back():
    """A prompt as long as those before it makes no token late, though finetuning takes all the time that there is."""
    engine = FakeEngine(num_blocks=4000, slo=SLO(ttft=10.0, tpot=0.05), idle_slice=1.0)
    engine.scheduler.add_job(make_job("j", [200] * 400))
    long = make_request("long", output=400)
    engine.add_request(long)
    for i in range(12):
        engine.add_request(make_request(f"prompt{i}", prompt=60, output=1, arrival=engine.now))
        for _ in range(20):
            engine.step()
            late = engine.now - long.first_token_time - (len(long.output_ids) - 1) * 0.05
            assert late <= 1e-9 or i < 2
    assert engine.scheduler._reserve.seconds > 0.02
