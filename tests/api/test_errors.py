"""Bad input is a 4xx in OpenAI's shape that names the field, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.conftest import CHAT, MODEL, Server, fake_settings, serve

GOOD = {"model": MODEL, "messages": CHAT}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 100000}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 2}, "best_of"),
        ({"functions": []}, "functions"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_bad_chat_fields_are_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = error_of(http.post("/v1/chat/completions", json=GOOD | change), 400)
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_bad_completion_fields_are_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = error_of(http.post("/v1/completions", json={"model": MODEL, "prompt": "x"} | change), 400)
    assert error["param"].startswith(param)


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_fields_are_named(http: httpx.Client, missing: str) -> None:
    body = {key: value for key, value in GOOD.items() if key != missing}
    error = error_of(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == missing
    assert "required" in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2", b"null", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"model": "\\ud800"}']
)
def test_malformed_json(http: httpx.Client, content: bytes) -> None:
    error_of(http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}), 400)


def test_text_that_is_no_text(http: httpx.Client) -> None:
    content = b'{"model": "%s", "messages": [{"role": "user", "content": "\\ud800"}]}' % MODEL.encode()
    error = error_of(http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}), 400)
    assert error["param"].startswith("messages.0.content")


def test_unknown_model(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="gpt-5", messages=CHAT)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_context_length(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 300}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 200, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    assert client.completions.create(model=MODEL, prompt="x" * 250).usage.completion_tokens == 6  # what is left of the context


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    error_of(http.get("/v1/unknown"), 404)
    error_of(http.get("/v1/chat/completions"), 405)
    error_of(http.get("/v1/fine_tuning/checkpoints/x/permissions"), 404)
    error_of(http.post("/v1/fine_tuning/alpha/graders/run", json={}), 404)
    error_of(http.get("/v1/models/unknown"), 404)
    error_of(http.delete(f"/v1/models/{MODEL}"), 400)
    error_of(http.post("/detokenize", json={"tokens": [99999]}), 400)
    error_of(http.post("/tokenize", json={}), 400)


def test_bodies_that_are_too_large(http: httpx.Client) -> None:
    error_of(http.post("/v1/chat/completions", content=b"x" * ((32 << 20) + 1)), 413)

    def chunks() -> Iterator[bytes]:  # no content-length
        for _ in range(33):
            yield b"x" * (1 << 20)

    error_of(http.post("/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"}), 413)


@pytest.fixture(scope="module")
def locked(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = fake_settings(tiny_llama, tmp_path_factory.mktemp("state"), api_key="sésame", max_upload_bytes=1000)
    with serve(settings) as running:
        yield running


def test_api_key(locked: Server) -> None:
    with locked.http() as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic abc"}, {"authorization": ""}):
            assert error_of(http.get("/v1/models", headers=headers), 401)["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"authorization": "Bearer sésame".encode()}).status_code == 200
        for path in ("/health", "/version", "/metrics", "/"):
            assert http.get(path).status_code == 200
        error_of(http.get("/flexllm/stats"), 401)
        error_of(http.post("/v1/files", files={"file": b"x"}), 401)


def test_upload_that_is_too_large(locked: Server) -> None:
    with locked.http(headers={"authorization": "Bearer sésame".encode()}) as http:
        big = {"file": ("big.jsonl", b"x" * (40 << 20))}
        assert error_of(http.post("/v1/files", files=big, data={"purpose": "fine-tune"}), 413)["code"] == "body_too_large"
        assert http.get("/v1/files").json()["data"] == []
