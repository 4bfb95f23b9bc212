from typing import Any

import pytest

from flexllm.config import SLO
from tests.scheduler.fake import FakeEngine, make_job, make_request


def loaded(**settings: Any) -> FakeEngine:
    engine = FakeEngine(**{"num_blocks": 200, "slo": SLO(ttft=100, tpot=10), **settings})
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
