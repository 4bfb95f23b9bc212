from typing import Any

import pytest

from flexllm.config import SLO, SchedulerConfig
from flexllm.scheduler.requests import PACE
from tests.scheduler.fake import FakeEngine, make_job, make_request


def loaded(**settings: Any) -> FakeEngine:
    engine = FakeEngine(**{"num_blocks": 200, "slo": SLO(ttft=1000, tpot=10), **settings})
    engine.scheduler.add_job(make_job("j", [40] * 4))
    engine.add_request(make_request("r", output=30))
    return engine


def kinds(engine: FakeEngine) -> list[str]:
    return ["".join(("i" * bool(p.inference), "f" * bool(p.windows or p.backward or p.optimizer_steps))) for p in engine.plans]


def test_coserve_does_both_in_one_iteration():
    engine = loaded()
    engine.run()
    assert kinds(engine)[:2] == ["i", "if"]
    assert len(engine.steps["j"]) == 2
    assert len(engine.outputs["r"]) == 30


def test_inference_lets_jobs_wait():
    engine = loaded(mode="inference")
    engine.run()
    assert set(kinds(engine)) == {"i"}
    assert [job.id for job in engine.scheduler.jobs] == ["j"]


def test_finetune_lets_requests_wait():
    engine = loaded(mode="finetune")
    engine.run()
    assert set(kinds(engine)) == {"f"}
    assert engine.scheduler.num_waiting == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_temporal_takes_turns(steps):
    engine = loaded(mode="temporal", temporal_inference_steps=steps)
    engine.run()
    assert kinds(engine)[: 2 * steps + 2] == (["i"] * steps + ["f"]) * 2
    assert len(engine.outputs["r"]) == 30
    assert len(engine.steps["j"]) == 2


def test_dynamic_temporal_finetunes_when_no_deadline_suffers():
    relaxed = loaded(mode="temporal", temporal_inference_steps=0)
    relaxed.run()
    assert kinds(relaxed)[:2] == ["i", "f"]
    strict = loaded(mode="temporal", temporal_inference_steps=0, slo=SLO(ttft=1.0, tpot=0.05))
    strict.run()
    assert kinds(strict)[:10] == ["i"] * 10
    assert len(strict.steps["j"]) == len(relaxed.steps["j"]) == 2


# ------------------------------------------------------------------------------------------------------- while it runs
def test_the_mode_may_change_in_mid_flight():
    engine = loaded(mode="inference")
    engine.step()
    engine.step()
    engine.reconfigure(mode="coserve")
    engine.step()
    engine.reconfigure(mode="inference")
    engine.step()
    engine.reconfigure(mode="temporal", temporal_inference_steps=2)
    engine.run()
    assert kinds(engine)[:4] == ["i", "i", "if", "i"]
    assert kinds(engine)[4:10] == ["f", "i", "i"] * 2
    assert len(engine.outputs["r"]) == 30
    assert len(engine.steps["j"]) == 2


def test_a_running_request_is_due_by_the_new_objectives_at_its_next_token():
    engine = FakeEngine(slo=SLO(ttft=10, tpot=0.5))
    request = make_request("r", output=20)
    engine.add_request(request)
    for _ in range(3):
        engine.step()
    engine.reconfigure(slo=SLO(ttft=10, tpot=2.0))
    now = engine.now
    assert engine.step().slack == pytest.approx((request.first_token_time + 3 * PACE * 2.0 - engine.config.reserve - now) / 1.1)
    engine.reconfigure(slo=SLO(ttft=10, tpot=1e-6))
    assert engine.step().slack == 0.0, "late by the new objectives"


def test_the_order_of_classes_follows_their_objectives():
    engine = FakeEngine(max_batch_tokens=8, class_slos={"batch": SLO(ttft=100, tpot=10)})
    engine.add_request(make_request("patient", priority="batch"))
    engine.add_request(make_request("urgent"))
    engine.reconfigure(class_slos={"batch": SLO(ttft=1, tpot=10)})
    assert [c.request.id for c in engine.step().inference] == ["patient"]
    engine.reconfigure(class_slos={"batch": SLO(ttft=100, tpot=10)})
    engine.run()
    assert len(engine.outputs["urgent"]) == len(engine.outputs["patient"]) == 4


@pytest.mark.parametrize("field", ["max_batch_tokens", "max_running", "max_waiting", "max_sequences"])
def test_what_sized_memory_stays(field):
    engine = loaded()
    before = engine.scheduler.config
    with pytest.raises(ValueError, match=f"{field} must be {getattr(before, field)}, as at the start, got 3"):
        engine.scheduler.reconfigure(SchedulerConfig(mode="inference", **{field: 3}))
    assert engine.scheduler.config is before
