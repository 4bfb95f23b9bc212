"""What finetuning leaves unused for requests that are not here yet."""

import pytest

from flexllm.config import SLO
from flexllm.scheduler.headroom import PromptBursts
from tests.scheduler.fake import FakeEngine, make_job, make_request


def test_the_reserve_is_what_bursts_of_prompts_take_beyond_the_pace():
    bursts = PromptBursts()
    bursts.end()
    assert bursts.reserve == 0.0
    for _ in range(3):  # a prompt of three chunks
        bursts.iteration(0.06, pace=0.05)
    assert bursts.reserve == 0.0  # not over yet
    bursts.end()
    assert bursts.reserve == pytest.approx(0.03)
    bursts.iteration(0.04, pace=0.05)
    bursts.end()
    assert bursts.reserve <= 0.03


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
    assert engine.scheduler._bursts.reserve > 0.02
