"""The official client against a real server process with the real engine, on a tiny random model."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.conftest import CHAT, MODEL, Server, eventually, training_lines, wait_for_job

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@contextlib.contextmanager
def serve_process(model: Path, state_dir: Path, *flags: str) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """`flexllm serve`, as a user runs it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flexllm.cli.main", "serve", str(model), "--port", str(port), "--state-dir", str(state_dir)]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--threads", "1", "--kv-cache-gb", "0.01", *flags]
    process = subprocess.Popen(command)
    server = Server(f"http://127.0.0.1:{port}", state_dir)
    try:
        eventually(lambda: process.poll() is not None or _healthy(server), seconds=120)
        assert process.poll() is None, "the server ended while it was loading"
        yield server, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_process(tiny_llama, tmp_path_factory.mktemp("state")) as (running, _):
        yield running


def job_of(client: OpenAI, **options: Any) -> Any:
    file = client.files.create(file=("train.jsonl", training_lines(12)), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, max_wait_seconds=10).status == "processed"
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, **options)


def text_of(client: OpenAI, model: str = MODEL, **options: Any) -> str:
    return client.chat.completions.create(model=model, messages=CHAT, **(GREEDY | options)).choices[0].message.content


def test_chat_stream_and_usage_agree(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    *chunks, last = client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage


def test_n_choices_are_the_seeds_that_follow(client: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    both = client.chat.completions.create(model=MODEL, messages=CHAT, n=2, seed=11, **options)
    alone = client.chat.completions.create(model=MODEL, messages=CHAT, seed=12, **options)
    texts = [c.message.content for c in both.choices]
    assert texts[0] != texts[1]
    assert texts[1] == alone.choices[0].message.content


def test_stop_strings_and_token_ids(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", logprobs=0, **GREEDY).choices[0]
    readable = next((t for t in answer.logprobs.tokens[2:] if t.isascii() and t not in answer.logprobs.tokens[:2]), None)
    if readable is not None:  # random weights rarely say two readable things
        stopped = client.completions.create(model=MODEL, prompt="abc", stop=readable, **GREEDY).choices[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == answer.text[: answer.text.index(readable)]
    by_id = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=12, extra_body={"stop_token_ids": list(range(2, 258)), "ignore_eos": True}
    )
    assert by_id.choices[0].finish_reason == "stop"


def test_logprobs_are_probabilities(client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY)
    for entry in chat.choices[0].logprobs.content:
        assert entry.logprob <= 0
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy
    first = client.completions.create(model=MODEL, prompt=[70, 71, 72], logprobs=0, **(GREEDY | {"max_tokens": 2}))
    scored = client.completions.create(model=MODEL, prompt=[70, 71, 72], max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert len(scored.choices[0].logprobs.tokens) == 3
    assert len(first.choices[0].logprobs.tokens) == 2


def test_seeded_sampling_repeats(client: OpenAI) -> None:
    assert text_of(client, temperature=1.0, seed=3) == text_of(client, temperature=1.0, seed=3)


def test_many_at_once_say_what_each_says_alone(client: OpenAI) -> None:
    prompts = [[40 + i, 50 + i, 60] for i in range(6)]
    alone = [client.completions.create(model=MODEL, prompt=p, **GREEDY).choices[0].text for p in prompts]
    together = client.completions.create(model=MODEL, prompt=prompts, **GREEDY)
    assert [c.text for c in together.choices] == alone


def test_life_of_a_job(client: OpenAI) -> None:
    before = text_of(client)
    job = job_of(client, suffix="x", seed=1, hyperparameters={"n_epochs": 3}, extra_body={"learning_rate": 0.02, "peft": {"r": 4}})
    during = text_of(client)
    done = wait_for_job(client, job.id, "succeeded")
    assert before == during == text_of(client)  # the base model does not change
    assert text_of(client, done.fine_tuned_model) != before
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # over several pages
    losses = [e.data["train_loss"] for e in events if e.type == "metrics" and "train_loss" in e.data][::-1]
    assert len(losses) == 9
    assert losses[-1] < losses[0]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [c.step_number for c in checkpoints] == [9, 6, 3]
    assert len({text_of(client, c.fine_tuned_model_checkpoint) for c in checkpoints}) > 1
    assert done.trained_tokens > 0
    assert client.files.content(done.result_files[0]).text.count("\n") == 10

    more = client.fine_tuning.jobs.create(
        model=done.fine_tuned_model, training_file=done.training_file, hyperparameters={"n_epochs": 1}, extra_body={"learning_rate": 0.01}
    )
    continued = wait_for_job(client, more.id, "succeeded")
    assert text_of(client, continued.fine_tuned_model)
    for name in (done.fine_tuned_model, continued.fine_tuned_model):
        assert client.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            text_of(client, name)


def test_pause_resume_cancel(client: OpenAI, server: Server) -> None:
    job = job_of(client, hyperparameters={"n_epochs": 1000, "batch_size": 1})
    wait_for_job(client, job.id, "running")

    def newest() -> int:
        data = [e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=5).data if e.data]
        return data[0]["step"] if data else 0

    eventually(lambda: newest() > 2)
    assert server.stats()["jobs"][-1]["status"] == "running"
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    time.sleep(0.3)
    at = newest()
    time.sleep(0.5)
    assert newest() == at
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    eventually(lambda: newest() > at)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)
    eventually(lambda: server.stats()["step"]["backward"] == 0)


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="unknown", messages=CHAT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 1000)
    assert caught.value.code == "context_length_exceeded"
    assert text_of(client)


def test_a_vanished_client_frees_its_pages(server: Server) -> None:
    body = {"model": MODEL, "messages": CHAT, "stream": True, "ignore_eos": True}
    for _ in range(3):
        with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    eventually(lambda: server.stats()["requests"]["running"] == 0 and server.stats()["kv_usage"] == 0)


def test_the_example_runs(server: Server) -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "client.py"), "--url", server.url, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Step 20/20" in done.stdout
    assert "finetuned:" in done.stdout


def test_kill_and_start_again_loses_nothing(server: Server, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(server.state_dir / "profiles", tmp_path / "profiles")  # measured once is enough
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with serve_process(tiny_llama, tmp_path) as (server, process):
        job = job_of(server.client(), seed=1, hyperparameters={"n_epochs": 8, "batch_size": 1})
        eventually(lambda: server.stats()["jobs"] and server.stats()["jobs"][0]["step"] > 3)
        engine = server.stats()["engine"]["pid"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: not _alive(engine))  # nobody is left behind,
        assert not list(scratch.iterdir())  # and nothing
    with serve_process(tiny_llama, tmp_path) as (server, _):
        done = wait_for_job(server.client(), job.id, "succeeded")
        events = [e.data for e in server.client().fine_tuning.jobs.list_events(job.id, limit=1000).data if e.data]
        assert [d["step"] for d in events if "train_loss" in d][::-1] == list(range(1, 97))
        assert text_of(server.client(), done.fine_tuned_model)


def test_sigterm_drains(server: Server, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(server.state_dir / "profiles", tmp_path / "profiles")
    with serve_process(tiny_llama, tmp_path) as (server, process):
        pieces: list[str] = []

        def read() -> None:
            stream = server.client().completions.create(
                model=MODEL, prompt="abc", max_tokens=250, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            for chunk in stream:
                pieces.append(chunk.choices[0].finish_reason or "")

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: pieces)
        process.terminate()
        reader.join(timeout=60)
        assert pieces[-1] == "length"  # the request in flight ended in its own time
        assert process.wait(timeout=60) == 0


def test_what_cannot_be_served(tiny_llama: Path, server: Server) -> None:
    command = [sys.executable, "-m", "flexllm.cli.main", "serve", "--port", "0"]
    for flags, reason in (
        ([str(tiny_llama), "--state-dir", str(server.state_dir)], "in use by another server"),
        ([str(tiny_llama), "--state-dir", str(server.state_dir), "--port", server.url.rpartition(":")[2]], "cannot listen on"),
        ([str(tiny_llama / "missing"), "--state-dir", str(server.state_dir / "other")], "missing"),
    ):
        ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
        assert len(errors) == 1
        assert reason in errors[0]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").exists() else True
