import pytest

from flexllm.config import SLO
from flexllm.core import FinishReason, InferenceChunk, RequestStatus, SamplingParams
from flexllm.scheduler.requests import LEAST_ROWS, PACE, QueueFullError
from tests.scheduler.fake import FakeEngine, expected_token, make_request, simple_model


def rows(chunks: tuple[InferenceChunk, ...]) -> list[tuple[str, int, int, bool]]:
    return [(c.request.id, c.start, c.end, c.sample) for c in chunks]


def test_a_request_from_prompt_to_end():
    engine = FakeEngine()
    request = make_request("r", prompt=5, output=3)
    engine.add_request(request)
    assert (engine.scheduler.num_waiting, engine.scheduler.num_running) == (1, 0)
    assert rows(engine.step().inference) == [("r", 0, 5, True)]
    assert (engine.scheduler.num_waiting, engine.scheduler.num_running) == (0, 1)
    assert rows(engine.step().inference) == [("r", 5, 6, True)]
    assert rows(engine.step().inference) == [("r", 6, 7, True)]
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, FinishReason.LENGTH)
    assert request.output_ids == [expected_token(request, p) for p in (5, 6, 7)]
    assert request.first_token_time < request.last_token_time == engine.now
    assert not engine.scheduler.has_work
    assert engine.pool.num_used == 0
    assert [o.finish_reason for o in engine.outputs["r"]] == [None, None, FinishReason.LENGTH]


def test_long_prompts_are_cut_and_decode_rows_come_first():
    engine = FakeEngine(max_batch_tokens=8)
    engine.add_request(make_request("a", prompt=4, output=5))
    engine.step()
    engine.add_request(make_request("b", prompt=12))
    engine.add_request(make_request("c", prompt=5))
    assert rows(engine.step().inference) == [("a", 4, 5, True), ("b", 0, 7, False)]
    assert rows(engine.step().inference) == [("a", 5, 6, True), ("b", 7, 12, True), ("c", 0, 2, False)]


def test_a_prefills_single_last_row_stands_with_the_decode_rows():
    engine = FakeEngine(max_batch_tokens=8)
    engine.add_request(make_request("a", prompt=9))
    engine.step()
    engine.add_request(make_request("b", prompt=4))
    assert rows(engine.step().inference) == [("a", 8, 9, True), ("b", 0, 4, True)]


def test_classes_with_the_tighter_objective_go_first():
    engine = FakeEngine(max_batch_tokens=8, class_slos={"batch": SLO(ttft=60, tpot=5)})
    engine.add_request(make_request("slow", prompt=12, priority="batch"))
    engine.step()
    engine.add_request(make_request("fast", prompt=6))
    assert rows(engine.step().inference) == [("fast", 0, 6, True), ("slow", 8, 10, False)]


def test_prompts_that_can_wait_make_no_urgent_token_late():
    engine = FakeEngine(slo=SLO(ttft=1, tpot=0.05), class_slos={"batch": SLO(ttft=60, tpot=5)}, num_blocks=200)
    engine.add_request(make_request("fast", output=30))
    engine.step()
    slow = make_request("slow", prompt=300, output=2, priority="batch")
    engine.add_request(slow)
    fast = engine.requests["fast"]
    while fast.id in engine.scheduler._requests:
        plan = engine.step()
        in_time = engine.now <= fast.first_token_time + (len(fast.output_ids) - 1) * 0.05
        assert in_time or sum(c.rows for c in plan.inference if c.request is slow) <= LEAST_ROWS
        if fast.finish_reason:
            break
    assert (fast.last_token_time - fast.first_token_time) / 29 <= 0.05
    assert slow.num_computed > 100
    engine.run()
    assert len(slow.output_ids) == 2


def test_prompts_that_can_wait_still_go_on_beside_late_ones():
    engine = FakeEngine(slo=SLO(ttft=1e-3, tpot=1e-3), class_slos={"batch": SLO(ttft=60, tpot=5)}, num_blocks=200)
    engine.add_request(make_request("fast", output=30))
    engine.step()
    engine.add_request(make_request("slow", prompt=300, priority="batch"))
    assert [c.rows for c in engine.step().inference] == [1, LEAST_ROWS]


def test_rows_that_cost_nothing_beside_those_that_make_it_late_come_too():
    """Where a GPU takes 60 ms to be told of an iteration, whatever its rows, a prompt in small pieces would only be late more often."""
    engine = FakeEngine(num_blocks=400, slo=SLO(ttft=5, tpot=0.05), latency=simple_model(1e-6, t0=0.06), max_batch_tokens=512)
    engine.add_request(make_request("running", output=30))
    engine.step()
    engine.add_request(make_request("new", prompt=300))
    assert [c.rows for c in engine.step().inference] == [1, 300]


def decoding_beside_a_prompt(ttft: float) -> tuple[FakeEngine, list[int]]:
    """A request that decodes, and the prompt rows of each iteration after another of its class came. A row takes 1 ms, so 30 fit."""
    engine = FakeEngine(num_blocks=200, slo=SLO(ttft=ttft, tpot=0.05), latency=simple_model(1e-3), max_batch_tokens=512)
    engine.add_request(make_request("running", output=100))
    engine.step()
    engine.add_request(make_request("new", prompt=400, output=1, arrival=engine.now))
    rows = []
    while "new" in engine.requests:
        rows.append(engine.step().inference_rows - 1)
    return engine, rows


def test_a_prompt_waits_for_running_requests_while_its_objective_lets_it():
    engine, rows = decoding_beside_a_prompt(ttft=10.0)
    running = engine.requests["running"]
    assert max(rows) < 50
    assert len(rows) > 8
    assert engine.now - running.first_token_time <= (len(running.output_ids) - 1) * 0.05


def test_a_prompt_that_cannot_wait_makes_running_requests_late():
    assert decoding_beside_a_prompt(ttft=0.4)[1] == [400]


def test_a_prompt_that_can_wait_a_little_makes_running_requests_a_little_late():
    """Of 0.55 s, 0.45 may pass until its 400 ms are done, beside 8 ms of decode rows an iteration: some 64 rows in each."""
    engine = FakeEngine(num_blocks=200, slo=SLO(ttft=0.55, tpot=0.05), latency=simple_model(1e-3), max_batch_tokens=512)
    for i in range(8):
        engine.add_request(make_request(f"running{i}", prompt=1, output=100))
    engine.step()
    engine.add_request(make_request("new", prompt=400, output=1, arrival=engine.now))
    came, rows = engine.now, []
    while "new" in engine.requests:
        rows.append(engine.step().inference_rows - 8)
    assert 45 < rows[0] < 100
    assert max(rows) < 150
    assert engine.now - came <= 0.55


def test_a_queue_of_prompts_presses_though_none_of_them_alone_does():
    engine = FakeEngine(num_blocks=400, slo=SLO(ttft=0.85, tpot=0.05), latency=simple_model(1e-3), max_batch_tokens=512, max_running=2)
    engine.add_request(make_request("running", output=100))
    engine.step()
    for i in range(4):
        engine.add_request(make_request(f"new{i}", prompt=200, output=1, arrival=engine.now))
    assert engine.step().inference_rows == 1 + 200


def test_max_running_keeps_the_others_waiting():
    engine = FakeEngine(max_running=2)
    for i in range(3):
        engine.add_request(make_request(f"r{i}", output=2))
    assert [c.request.id for c in engine.step().inference] == ["r0", "r1"]
    engine.step()
    assert [c.request.id for c in engine.step().inference] == ["r2"]


def test_the_latest_arrival_gives_way_and_says_the_same_later():
    engine = FakeEngine(num_blocks=6, block_size=4)
    requests = [make_request(f"r{i}", prompt=8, output=8, arrival=float(i)) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    engine.run()
    assert [r.num_preemptions > 0 for r in requests] == [False, True, True]
    assert engine.scheduler.num_preemptions == sum(r.num_preemptions for r in requests)
    for request in requests:
        assert request.output_ids == [expected_token(request, p) for p in range(8, 16)]


def test_a_preempted_request_keeps_its_place_and_its_deadline():
    engine = FakeEngine(num_blocks=5, block_size=4, slo=SLO(ttft=10, tpot=0.5))
    old, new = make_request("old", prompt=8, output=9, arrival=0.0), make_request("new", prompt=7, output=9, arrival=1.0)
    engine.add_request(old)
    engine.add_request(new)
    while not new.num_preemptions:
        plan = engine.step()
    engine.add_request(make_request("newest", prompt=4, arrival=2.0))
    assert plan.slack <= new.first_token_time + len(new.output_ids) * 0.5 - engine.now + plan.predicted
    engine.run()
    ends = {request_id: max(i for i, p in enumerate(engine.plans) if any(c.request.id == request_id for c in p.inference))
            for request_id in ("old", "new", "newest")}  # fmt: skip
    assert ends["old"] < ends["new"]


@pytest.mark.parametrize(
    ("sampling", "eos", "reason", "produced"),
    [
        (SamplingParams(max_tokens=3), (), FinishReason.LENGTH, 3),
        (SamplingParams(max_tokens=9), (1,), FinishReason.STOP, 2),
        (SamplingParams(max_tokens=3, ignore_eos=True), (1,), FinishReason.LENGTH, 3),
        (SamplingParams(max_tokens=9, stop_token_ids=(0,), ignore_eos=True), (1,), FinishReason.STOP, 1),
    ],
)
def test_why_a_request_ends(sampling, eos, reason, produced):
    engine = FakeEngine()
    request = make_request("r", prompt=5)
    tokens = [expected_token(request, p) for p in (5, 6)]
    request.sampling = sampling
    if sampling.stop_token_ids:
        request.sampling = SamplingParams(max_tokens=9, stop_token_ids=(tokens[0],), ignore_eos=True)
    request.eos_ids = frozenset(tokens[i] for i in eos)
    engine.add_request(request)
    engine.run()
    assert (request.finish_reason, len(request.output_ids)) == (reason, produced)


def test_the_context_ends_a_request():
    engine = FakeEngine(num_blocks=3, block_size=4)
    short = make_request("short", prompt=4, output=100, max_len=9)
    engine.add_request(short)
    engine.run()
    assert (short.finish_reason, short.num_tokens) == (FinishReason.LENGTH, 9)
    full = make_request("full", prompt=4, output=100)
    engine.add_request(full)
    engine.run()
    assert (full.finish_reason, full.num_tokens) == (FinishReason.LENGTH, 12)


def test_a_request_may_be_aborted_at_any_time():
    engine = FakeEngine(max_running=2)
    requests = {name: make_request(name, prompt=6) for name in ("decoding", "prefilling", "waiting")}
    engine.add_request(requests["decoding"])
    engine.step()
    engine.add_request(requests["prefilling"])
    engine.add_request(requests["waiting"])
    for name, request in requests.items():
        assert engine.scheduler.abort_request(name) is request
        assert (request.status, request.finish_reason, request.blocks) == (RequestStatus.FINISHED, FinishReason.ABORT, [])
        engine.scheduler.check_integrity()
    assert engine.scheduler.abort_request("decoding") is None
    assert not engine.scheduler.has_work


def test_an_abort_during_the_iteration_leaves_its_tokens_unheard():
    engine = FakeEngine()
    engine.add_request(make_request("a"))
    engine.add_request(make_request("b"))
    engine.step(between=lambda: engine.abort("a"))
    assert (len(engine.outputs["a"]), len(engine.outputs["b"])) == (0, 1)
    engine.run()


def test_what_cannot_be_served_is_refused():
    engine = FakeEngine(num_blocks=3, block_size=4, max_waiting=1)
    with pytest.raises(ValueError, match="the prompt has 12 tokens; the K/V cache holds 12"):
        engine.add_request(make_request("r", prompt=12))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.add_request(make_request("r", prompt=0))
    engine.add_request(make_request("r", prompt=11))
    with pytest.raises(ValueError, match="'r' is in use"):
        engine.add_request(make_request("r"))
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        engine.add_request(make_request("s"))


@pytest.mark.parametrize(("ttft", "reserve"), [(10, 0.25), (2.5, 1.0), (0.1, 1.0)])
def test_slack_is_the_earliest_deadline_less_the_reserve(ttft: float, reserve: float):
    engine = FakeEngine(slo=SLO(ttft=ttft, tpot=0.5))
    request = make_request("r", output=20)
    engine.add_request(request)
    assert engine.step().slack == 0.0  # the prompt
    for _ in range(3):
        now, tokens = engine.now, len(request.output_ids)
        assert engine.step().slack == pytest.approx(max(0.0, request.first_token_time + tokens * PACE * 0.5 - reserve - now) / 1.1)
    engine.now += 100.0
    assert engine.step().slack == 0.0
    engine.add_request(make_request("late", arrival=engine.now - 20))
    assert engine.step().slack == 0.0


def test_no_slack_before_the_last_prompt_is_computed():
    engine = FakeEngine(max_batch_tokens=16, slo=SLO(ttft=1e6, tpot=1000))
    for i in range(3):
        engine.add_request(make_request(f"r{i}", prompt=12, output=20))
    slacks = [engine.step().slack for _ in range(5)]
    assert slacks[:3] == [0.0, 0.0, 0.0]  # 16, 15 and 7 rows
    assert min(slacks[3:]) > 100
