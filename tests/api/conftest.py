"""A server on a free port, in a thread of the test process, with the fake engine in a process of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from flexllm.config import EngineConfig
from flexllm.server.app import create_app
from flexllm.server.context import Settings
from tests.api.fake_engine import FakeEngine, build_fake

MODEL = "tiny"
CHAT = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Server:
    url: str
    state_dir: Path

    def client(self, api_key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=30, **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def stats(self) -> dict[str, Any]:
        return self.http().get("/flexllm/stats").json()


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of `condition`, polled; AssertionError when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def wait_for_job(client: OpenAI, job_id: str, status: str) -> Any:
    """The job once it has that status; AssertionError if it ends with another."""

    def reached() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status == status or job.status not in ("failed", "cancelled", "succeeded"), job
        return job if job.status == status else None

    return eventually(reached)


@contextmanager
def serve(settings: Settings, wait: bool = True) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if wait:
            eventually(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield Server(url, settings.engine.state_dir)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


def fake_settings(model: Path, state_dir: Path, kind: type[FakeEngine] = FakeEngine, **options: Any) -> Settings:
    build = partial(build_fake, kind=kind)
    return Settings(EngineConfig(model=str(model), state_dir=state_dir), served_model_name=MODEL, build_engine=build, **options)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("good", "better"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(tiny_llama: Path, adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = fake_settings(tiny_llama, tmp_path_factory.mktemp("state"), enable_adapter_loading=True, adapter_dir=adapter_dir)
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def training_lines(n: int) -> bytes:
    """n chat examples, as JSONL."""
    lines = (
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(n)
    )
    return "\n".join(json.dumps(line) for line in lines).encode()
