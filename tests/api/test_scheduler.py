"""GET and PATCH /scheduler: settings change while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flexllm.config import SchedulerConfig
from tests.api.conftest import CHAT, MODEL, Server, eventually, fake_settings, serve
from tests.api.test_errors import error_of


@pytest.fixture
def server(tiny_llama: Path, tmp_path: Path) -> Iterator[Server]:
    with serve(fake_settings(tiny_llama, tmp_path, api_key="key")) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http(headers={"authorization": "Bearer key"}) as client:
        yield client


def mode_of_the_engine(server: Server) -> Any:
    answer = server.client("key").chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "MODE"}])
    return answer.choices[0].message.content


def test_only_what_is_named_changes(server: Server, http: httpx.Client) -> None:
    before = http.get("/scheduler").json()
    assert before == asdict(SchedulerConfig())
    patch = {"mode": "temporal", "slo": {"tpot": 0.25}, "class_slos": {"batch": {"ttft": 30}}, "temporal_inference_steps": 0}
    changed = http.patch("/scheduler", json=patch)
    assert changed.status_code == 200
    wanted = {**before, "mode": "temporal", "slo": {"ttft": 1.0, "tpot": 0.25}, "temporal_inference_steps": 0}
    wanted["class_slos"] = {"batch": {"ttft": 30, "tpot": 0.25}}
    assert changed.json() == http.get("/scheduler").json() == wanted
    assert mode_of_the_engine(server) == "temporal"
    again = http.patch("/scheduler", json={"idle_slice": 0.1, "max_window_rows": 64, "class_slos": {"interactive": {"ttft": 2}}}).json()
    assert again["class_slos"] == {"batch": {"ttft": 30, "tpot": 0.25}, "interactive": {"ttft": 2, "tpot": 0.25}}
    assert (again["mode"], again["idle_slice"], again["max_window_rows"]) == ("temporal", 0.1, 64)


@pytest.mark.parametrize(
    ("patch", "param"),
    [
        ({"mode": "sleep"}, "mode"),
        ({"slo": {"ttft": 0}}, "slo.ttft"),
        ({"slo": {"tail": 1}}, "slo.tail"),
        ({"class_slos": {"batch": {"tpot": -1}}}, "class_slos.batch.tpot"),
        ({"class_slos": {"royal": {"tpot": 1}}}, "class_slos.royal"),
        ({"temporal_inference_steps": -1}, "temporal_inference_steps"),
        ({"idle_slice": 0}, "idle_slice"),
        ({"max_window_rows": 0}, "max_window_rows"),
        ({"max_running": 3}, "max_running"),
    ],
)
def test_what_cannot_be_changes_nothing(patch: dict[str, Any], param: str, http: httpx.Client) -> None:
    before = http.get("/scheduler").json()
    assert error_of(http.patch("/scheduler", json={"idle_slice": 0.3, **patch}), 400)["param"] == param
    assert http.get("/scheduler").json() == before


def test_it_asks_for_the_key(server: Server) -> None:
    with server.http() as stranger:
        error_of(stranger.get("/scheduler"), 401)
        error_of(stranger.patch("/scheduler", json={"mode": "inference"}), 401)


def test_requests_are_judged_by_the_objectives_of_now(server: Server, http: httpx.Client) -> None:
    def attained() -> Any:
        server.client("key").chat.completions.create(model=MODEL, messages=CHAT)
        return http.get("/flexllm/stats").json()["slo"]

    assert attained()["attainment"] == 1.0
    http.patch("/scheduler", json={"slo": {"tpot": 1e-6}})
    assert attained() == {"ttft": 1.0, "tpot": 1e-6, "attainment": 0.5}
    assert 'flexllm:slo_attainment_ratio{slo="tpot"} 0.5' in http.get("/metrics").text


def test_an_engine_that_comes_back_has_the_changed_settings(server: Server, http: httpx.Client) -> None:
    http.patch("/scheduler", json={"mode": "temporal"})
    with pytest.raises(openai.InternalServerError):
        server.client("key").chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "CRASH"}])
    error_of(http.patch("/scheduler", json={"mode": "inference"}), 503)
    eventually(lambda: http.get("/health").status_code == 200)
    assert http.get("/scheduler").json()["mode"] == mode_of_the_engine(server) == "temporal"
