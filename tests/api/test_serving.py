"""Generation through the official client, against the fake engine."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client import generate_latest

from flexllm.config import SchedulerConfig
from flexllm.server.metrics import Metrics
from tests.api.conftest import CHAT, MODEL, Server, eventually
from tests.api.fake_engine import REPLY

SLOW = [{"role": "user", "content": "SLOW"}]


def chat(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=CHAT, **options)


def test_chat(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage.completion_tokens == len(REPLY.encode()) + 1  # the end-of-sequence token counts
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_stream_is_the_whole_answer_and_characters_stay_whole(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(pieces) == REPLY
    assert "ö" in pieces
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert all(c.usage is None for c in chunks)
    assert len({c.id for c in chunks}) == 1


def test_stream_usage_is_the_last_chunk(client: OpenAI) -> None:
    *_, last = chat(client, stream=True, stream_options={"include_usage": True}, max_tokens=5)
    assert last.choices == []
    assert last.usage.completion_tokens == 5


def test_stream_framing(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, "stream": True, "max_tokens": 3})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event[6:])["object"] == "chat.completion.chunk" for event in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_ends_by_length(client: OpenAI, stream: bool) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, stream=stream, **{field: 4})
        last = list(answer)[-1] if stream else answer
        assert last.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_cut_out_and_ends_the_request(server: Server, client: OpenAI, stream: bool) -> None:
    answer = chat(client, stop=[", this", "nowhere"], stream=stream, extra_body={"ignore_eos": True})
    chunks = list(answer) if stream else [answer]
    text = "".join((c.choices[0].delta if stream else c.choices[0].message).content or "" for c in chunks)
    assert text == "Hello wörld"
    assert chunks[-1].choices[0].finish_reason == "stop"
    eventually(lambda: server.stats()["requests"]["running"] == 0)


@pytest.mark.parametrize(("tier", "priority"), [("auto", "interactive"), ("priority", "interactive"), ("flex", "batch")])
def test_service_tier_is_the_class_of_the_request(client: OpenAI, tier: Any, priority: str) -> None:
    messages: Any = [{"role": "user", "content": "CLASS"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, service_tier=tier)
    assert answer.choices[0].message.content == priority


def test_n_choices(client: OpenAI) -> None:
    answer = chat(client, n=3, seed=7, max_tokens=4)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 12
    seen = {c.choices[0].index for c in chat(client, n=3, stream=True, max_tokens=2)}
    assert seen == {0, 1, 2}


def test_chat_logprobs(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "Hello"
    assert content[0].bytes == [ord("H")]
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, stream=True, max_tokens=5)]
    assert sum(len(part.content) for part in streamed if part) == 5


def test_completion_shapes(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["ab", "cde"], max_tokens=5, n=2)
    assert [c.text for c in answer.choices] == ["Hello"] * 4
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5  # a prompt counts once
    assert client.completions.create(model=MODEL, prompt=[66, 67], max_tokens=1).usage.prompt_tokens == 2
    assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16  # OpenAI's default


def test_echo_with_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=2, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "abcHe"
    assert choice.logprobs.tokens == ["a", "b", "c", "H", "e"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs[1] == {"b": -0.5}
    scored = client.completions.create(model=MODEL, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "abc"
    assert scored.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert scored.usage.completion_tokens == 0


def test_echo_streams_the_prompt_first(client: OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="abc", max_tokens=2, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "abcHe"


def test_text_parts_and_developer_role(client: OpenAI) -> None:
    parts = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    a, b = (client.chat.completions.create(model=MODEL, messages=m, max_tokens=1) for m in (parts, plain))
    assert a.usage.prompt_tokens == b.usage.prompt_tokens


def test_a_client_that_vanishes_frees_the_engine(server: Server) -> None:
    body = {"model": MODEL, "messages": SLOW, "stream": True, "ignore_eos": True}
    with server.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
            assert eventually(lambda: server.stats()["requests"]["running"] == 1)
        eventually(lambda: server.stats()["requests"]["running"] == 0)


def test_a_client_that_vanishes_before_a_whole_answer(server: Server) -> None:
    body = {"model": MODEL, "messages": SLOW, "ignore_eos": True, "n": 2}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=1) as http:
        http.post(f"{server.url}/v1/chat/completions", json=body)
    assert server.stats()["requests"]["running"] == 2
    eventually(lambda: server.stats()["requests"]["running"] == 0, seconds=2)


def test_engine_errors(client: OpenAI) -> None:
    def ask(text: str, **options: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **options)

    with pytest.raises(openai.BadRequestError, match="refused"):
        ask("REFUSE")
    with pytest.raises(openai.RateLimitError) as limited:
        ask("BUSY", n=2)
    assert limited.value.response.headers["retry-after"]
    with pytest.raises(openai.InternalServerError, match="the iteration failed"):
        ask("BREAK")
    with pytest.raises(openai.APIError, match="the iteration failed"):
        list(ask("BREAK", stream=True))


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
    assert answer["count"] == 3
    assert answer["token_strs"] == ["a", "b", "c"]
    assert http.post("/detokenize", json={"model": MODEL, "tokens": answer["tokens"]}).json() == {"prompt": "abc"}
    messages = http.post("/tokenize", json={"model": MODEL, "messages": CHAT}).json()
    assert messages["count"] > answer["count"]


def test_rates_rise_from_zero() -> None:
    text = generate_latest(Metrics(SchedulerConfig(), MODEL).registry).decode()
    for kind in ("inference", "finetune", "mixed"):
        assert f'flexllm:step_seconds_count{{kind="{kind}"}} 0.0' in text
    for reason in ("stop", "length", "abort"):
        assert f'vllm:request_success_total{{finished_reason="{reason}",model_name="{MODEL}"}} 0.0' in text


def test_metrics_have_the_names_gateways_expect(client: OpenAI, http: httpx.Client) -> None:
    chat(client)

    def reported() -> str | None:  # the engine tells what it did every so often
        text = http.get("/metrics").text
        return text if re.search(r'flexllm:step_seconds_count{kind="inference"} [1-9]', text) else None

    text = eventually(reported)
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        'vllm:request_success_total{finished_reason="stop"',
        "vllm:lora_requests_info",
        'flexllm:slo_attainment_ratio{slo="ttft"}',
        "flexllm:finetune_tokens_total",
        "flexllm:step_seconds_bucket",
        "flexllm:latency_prediction_error_ratio",
        "flexllm:slack_seconds",
        "flexllm:finetune_loss",
        'flexllm:memory_bytes{pool="weights"}',
    ):
        assert name in text, name


def test_stats(server: Server, client: OpenAI) -> None:
    chat(client)
    stats = server.stats()
    assert stats["status"] == "ready"
    assert stats["ttft_ms"]["p50"] > 0
    assert stats["tpot_ms"]["p99"] > 0
    assert stats["slo"]["attainment"] == 1.0


def test_system_pages(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ready"}
    assert http.get("/version").json()["version"]
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/openapi.json").status_code == 200
