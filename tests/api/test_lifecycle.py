"""Loading, draining, dying: the server says what it is, and forgets nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from flexllm.config import EngineConfig
from flexllm.core import JobEvent, StepResult, nobody_waits
from flexllm.server.context import Settings
from flexllm.server.engine_process import ProgressCallback
from flexllm.server.store import Store
from tests.api.conftest import CHAT, MODEL, Server, eventually, fake_settings, serve, training_lines, wait_for_job
from tests.api.fake_engine import FakeEngine, build_fake


def build_slowly(config: EngineConfig, progress: ProgressCallback) -> FakeEngine:
    progress("profiling", 0.25)
    time.sleep(1.0)
    return build_fake(config, progress)


def build_never(config: EngineConfig, progress: ProgressCallback) -> FakeEngine:  # noqa: ARG001
    raise ValueError("this model cannot be loaded")


def start_job(server: Server, **options: Any) -> str:
    client = server.client()
    file = client.files.create(file=("train.jsonl", training_lines(8)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, **options).id


def steps_of(server: Server, job_id: str) -> list[int]:
    events = server.client().fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]


def test_loading_is_503_and_jobs_wait_for_the_engine(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(EngineConfig(model=str(tiny_llama), state_dir=tmp_path), served_model_name=MODEL, build_engine=build_slowly)
    with serve(settings, wait=False) as server, server.http() as http:
        loading = eventually(lambda: r if (r := http.get("/health")).json().get("stage") == "profiling" else None)
        assert loading.status_code == 503
        assert loading.headers["retry-after"]
        assert loading.json() == {"status": "loading", "stage": "profiling", "progress": 0.25}
        refused = http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        job_id = start_job(server, hyperparameters={"n_epochs": 1})
        assert server.client().models.list().data[0].id == MODEL
        eventually(lambda: http.get("/health").status_code == 200)
        wait_for_job(server.client(), job_id, "succeeded")


def test_a_model_that_cannot_be_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(EngineConfig(model=str(tiny_llama), state_dir=tmp_path), build_engine=build_never)
    with serve(settings, wait=False) as server, server.http() as http:
        dead = eventually(lambda: r if (r := http.get("/health")).json()["status"] == "dead" else None)
        assert dead.json()["message"] == "this model cannot be loaded"


def test_the_engine_dies_and_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(fake_settings(tiny_llama, tmp_path)) as server, server.http() as http:
        client = server.client()
        done = start_job(server, hyperparameters={"n_epochs": 1})
        adapter = wait_for_job(client, done, "succeeded").fine_tuned_model
        job_id = start_job(server, hyperparameters={"n_epochs": 50, "batch_size": 8})
        eventually(lambda: len(steps_of(server, job_id)) > 2)
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "SLOW"}], stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        os.kill(server.stats()["engine"]["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
        eventually(lambda: http.get("/health").status_code == 503)
        eventually(lambda: http.get("/health").status_code == 200)
        assert server.stats()["engine"]["starts"] == 2
        assert client.chat.completions.create(model=adapter, messages=CHAT).choices[0].finish_reason == "stop"
        wait_for_job(client, job_id, "succeeded")
        assert steps_of(server, job_id) == list(range(1, 51))  # each step is told once


@dataclass
class SilentEngine(FakeEngine):
    """Is gone, once, with a step that is durable and that nobody heard of."""

    def step(self, waited: Callable[[], float] = nobody_waits) -> StepResult:
        result = super().step(waited)
        marker = self.config.state_dir / "was-gone"
        if any(event.kind == "step" and event.step == 6 for event in result.events) and not marker.exists():
            marker.touch()
            os._exit(9)
        return result


def test_a_step_that_nobody_heard_of(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(fake_settings(tiny_llama, tmp_path, SilentEngine)) as server:
        job_id = start_job(server, hyperparameters={"n_epochs": 10, "batch_size": 8})
        wait_for_job(server.client(), job_id, "succeeded")
        assert server.stats()["engine"]["starts"] == 2
        assert steps_of(server, job_id) == list(range(1, 11))


class DoomedEngine(FakeEngine):
    """No job gets beyond its fifth step."""

    def step(self, waited: Callable[[], float] = nobody_waits) -> StepResult:
        if any(job.step == 5 and not job.untold for job in self._jobs.values()):
            os._exit(9)
        return super().step(waited)


def test_a_job_that_kills_the_engine_fails(tiny_llama: Path, tmp_path: Path) -> None:
    """Though each start tells the same five steps again: that is no progress."""
    with serve(fake_settings(tiny_llama, tmp_path, DoomedEngine)) as server:
        job_id = start_job(server, hyperparameters={"n_epochs": 10, "batch_size": 8})
        job = wait_for_job(server.client(), job_id, "failed")
        assert job.error.code == "engine_crashed"
        assert steps_of(server, job_id) == list(range(1, 6))
        eventually(lambda: server.http().get("/health").status_code == 200)


def test_a_request_that_kills_the_engine_fails_alone(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(fake_settings(tiny_llama, tmp_path)) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "CRASH"}])
        eventually(lambda: server.http().get("/health").status_code == 200)
        assert client.chat.completions.create(model=MODEL, messages=CHAT).choices


def test_an_end_that_nobody_heard_of(tiny_llama: Path, tmp_path: Path) -> None:
    """The engine wrote the last checkpoint; the server was killed before it stored the news of it, and of the two steps before."""
    settings = fake_settings(tiny_llama, tmp_path)
    with serve(settings) as server:
        job_id = start_job(server, hyperparameters={"n_epochs": 6})
        name = wait_for_job(server.client(), job_id, "succeeded").fine_tuned_model
    store = Store(tmp_path / "flexllm.sqlite")
    job = store.jobs.get(job_id)
    assert job is not None
    job.status, job.fine_tuned_model, job.result_files, job.step = "running", None, [], 10
    store.jobs.update(job)
    for event in list(store.events.all(owner=job_id)):
        if event.data is not None and event.data["step"] > 10:
            store.events.delete(event.id)
    store.adapters.delete(name)
    store.close()
    with serve(settings) as server:
        done = wait_for_job(server.client(), job_id, "succeeded")
        assert done.fine_tuned_model == name
        assert len(done.result_files) == 1
        assert server.client().chat.completions.create(model=name, messages=CHAT).choices
        assert steps_of(server, job_id) == list(range(1, 13))


@dataclass
class LateEngine(FakeEngine):
    """Says that a job has ended only when it is shut down."""

    late: list[JobEvent] = field(default_factory=list)

    def step(self, waited: Callable[[], float] = nobody_waits) -> StepResult:
        result = super().step(waited)
        self.late += [event for event in result.events if event.kind == "status"]
        return replace(result, events=tuple(event for event in result.events if event.kind != "status"))

    def shutdown(self) -> tuple[JobEvent, ...]:
        return tuple(self.late)


def test_the_last_words_of_the_engine_are_heard(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(fake_settings(tiny_llama, tmp_path, LateEngine)) as server:
        job_id = start_job(server, hyperparameters={"n_epochs": 1})
        eventually(lambda: len(steps_of(server, job_id)) == 2)
    store = Store(tmp_path / "flexllm.sqlite")
    job = store.jobs.get(job_id)
    store.close()
    assert job is not None
    assert job.status == "succeeded"


def test_everything_is_there_after_a_restart(tiny_llama: Path, tmp_path: Path) -> None:
    settings = fake_settings(tiny_llama, tmp_path)
    with serve(settings) as server:
        finished = start_job(server, hyperparameters={"n_epochs": 1})
        wait_for_job(server.client(), finished, "succeeded")
        running = start_job(server, hyperparameters={"n_epochs": 60, "batch_size": 8})
        paused = start_job(server, hyperparameters={"n_epochs": 30, "batch_size": 8})
        eventually(lambda: steps_of(server, paused))
        server.client().fine_tuning.jobs.pause(paused)
        eventually(lambda: steps_of(server, running))
    with serve(settings) as server:
        client = server.client()
        job = client.fine_tuning.jobs.retrieve(finished)
        assert client.chat.completions.create(model=job.fine_tuned_model, messages=CHAT).choices
        assert client.fine_tuning.jobs.retrieve(paused).status == "paused"
        wait_for_job(client, running, "succeeded")
        assert steps_of(server, running) == list(range(1, 61))
        client.fine_tuning.jobs.resume(paused)
        wait_for_job(client, paused, "succeeded")
        assert steps_of(server, paused) == list(range(1, 31))
        assert client.files.list().data
