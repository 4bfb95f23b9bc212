"""Chat and plain completions, and tokenization."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from flexllm.core import SamplingParams
from flexllm.server.choices import Choice, GenerationFailed, Prompt, advance
from flexllm.server.context import Context, ServedModel, get_context
from flexllm.server.engine_client import EngineOverloaded, EngineUnavailable, Generation
from flexllm.server.errors import ApiError, bad_request, error_body
from flexllm.server.render import ChatRenderer, CompletionRenderer, Renderer, usage_of
from flexllm.server.streaming import EventStream, unless_disconnected
from flexllm.server.wire import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest

router = APIRouter()
ContextParam = Annotated[Context, Depends(get_context)]
OVERLOADED_RETRY_SECONDS = 1


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, context: ContextParam) -> Response:
    arrival = time.monotonic()
    context.find_model(body.model)
    model, _ = context.ready()
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens contradict each other", "max_completion_tokens")
    max_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    ids = await _chat_prompt(model, body)
    max_tokens = check_length(model, len(ids), getattr(body, max_field), max_field, default=None)
    sampling = body.sampling(model.config.vocab_size, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    return await respond(context, request, Work(body, [Prompt(ids)], sampling, arrival, ChatRenderer(body.model, model.tokenizer)))


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, context: ContextParam) -> Response:
    arrival = time.monotonic()
    context.find_model(body.model)
    model, _ = context.ready()
    prompts = await _completion_prompts(model, body)
    echo = bool(body.echo)
    score_only = echo and body.max_tokens == 0  # the prompt's own log probabilities; the engine samples one token at least
    longest = max(len(p.ids) for p in prompts)
    max_tokens = 1 if score_only else check_length(model, longest, body.max_tokens, "max_tokens", default=16)
    sampling = body.sampling(
        model.config.vocab_size, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=body.logprobs if echo else None
    )
    renderer = CompletionRenderer(body.model, model.tokenizer, echo)
    return await respond(context, request, Work(body, prompts, sampling, arrival, renderer, hide_tokens=score_only))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, context: ContextParam) -> dict[str, Any]:
    if body.model is not None:
        context.find_model(body.model)
    model, _ = context.ready()
    if body.prompt is not None and body.messages is None:
        ids = await asyncio.to_thread(model.tokenizer.encode, body.prompt, body.add_special_tokens)
    elif body.messages is not None and body.prompt is None:
        ids = await _chat_prompt(model, body)
    else:
        raise bad_request("give either prompt or messages", "prompt")
    strings = [model.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextParam) -> dict[str, Any]:
    if body.model is not None:
        context.find_model(body.model)
    model, _ = context.ready()
    _check_ids(model, body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}


# --------------------------------------------------------------------------------------------------------- the prompt
def check_length(model: ServedModel, prompt_tokens: int, max_tokens: int | None, field: str, default: int | None) -> int:
    """How many tokens to generate: what was asked for, if the context holds it, else `default`, else what is left."""
    room = model.max_model_len - prompt_tokens
    asked = 1 if max_tokens is None else max_tokens
    if room < 1 or asked > room:
        raise bad_request(
            f"this model's context is {model.max_model_len} tokens; the request asks for {prompt_tokens + asked} "
            f"({prompt_tokens} in the prompt, {asked} to generate)",
            field if room >= 1 else "messages" if default is None else "prompt",
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        if max_tokens < 1:
            raise bad_request(f"{field} must be at least 1, got {max_tokens}", field)
        return max_tokens
    return room if default is None else min(default, room)


async def _chat_prompt(model: ServedModel, body: ChatRequest | TokenizeRequest) -> list[int]:
    messages = [message.plain() for message in body.messages or []]
    generation_prompt = body.add_generation_prompt if isinstance(body, TokenizeRequest) else True
    try:
        return await asyncio.to_thread(model.tokenizer.apply_chat_template, messages, generation_prompt)
    except ValueError as error:
        raise bad_request(str(error), "messages") from None


async def _completion_prompts(model: ServedModel, body: CompletionRequest) -> list[Prompt]:
    given = body.prompt
    listed: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    prompts = []
    for prompt in listed:
        if isinstance(prompt, str):
            ids, text = await asyncio.to_thread(model.tokenizer.encode, prompt, True), prompt
        else:
            ids = prompt
            _check_ids(model, ids, "prompt")
            text = await asyncio.to_thread(model.tokenizer.decode, ids) if body.echo else ""
        if not ids:
            raise bad_request("prompt must not be empty", "prompt")
        prompts.append(Prompt(ids, text))
    if not prompts:
        raise bad_request("prompt must not be empty", "prompt")
    return prompts


def _check_ids(model: ServedModel, ids: list[int], field: str) -> None:
    size = model.config.vocab_size
    if bad := next((i for i in ids if not 0 <= i < size), None):
        raise bad_request(f"{field}: token id {bad} is not in the vocabulary of {size} tokens", field)


# -------------------------------------------------------------------------------------------------------- the response
@dataclass(frozen=True)
class Work:
    """One HTTP request, checked and tokenized. Its choices are prompts x n, in that order."""

    body: GenerationRequest
    prompts: list[Prompt]
    sampling: SamplingParams
    arrival: float
    renderer: Renderer
    hide_tokens: bool = False

    def choices(self, model: ServedModel, adapter: str | None) -> list[Choice]:
        n, seed = self.body.choices, self.sampling.seed
        return [
            Choice(
                index=i * n + j,
                request_id=f"{self.renderer.id}-{i}-{j}-{secrets.token_hex(4)}",
                prompt=prompt,
                sampling=self.sampling if seed is None else replace(self.sampling, seed=seed + j),
                tokenizer=model.tokenizer,
                arrival=self.arrival,
                adapter=adapter,
                priority=self.body.priority,
                hide_tokens=self.hide_tokens,
            )
            for i, prompt in enumerate(self.prompts)
            for j in range(n)
        ]


async def respond(context: Context, request: Request, work: Work) -> Response:
    include_usage = work.body.include_usage
    model, _ = context.ready()
    adapter = context.find_model(work.body.model)
    choices = work.choices(model, None if adapter is None else adapter.id)
    generation = await _submit(context, choices)
    if work.body.stream:
        return EventStream(_events(context, work, generation, choices, include_usage), close=generation.close)
    try:
        await unless_disconnected(request.receive, _exhaust(advance(generation, choices, context.metrics)))
    except (GenerationFailed, EngineUnavailable) as error:
        raise ApiError(500, str(error), code="generation_failed") from None
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    finally:
        generation.close()
    body = work.renderer.full(choices, usage_of(choices, work.body.choices))
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _submit(context: Context, choices: list[Choice]) -> Generation:
    _, engine = context.ready()
    requests = [(c.request_id, c.prompt.ids, c.sampling) for c in choices]
    try:
        return await engine.submit(requests, arrival=choices[0].arrival, adapter=choices[0].adapter, priority=choices[0].priority)
    except ValueError as error:
        raise bad_request(str(error)) from None
    except EngineOverloaded as error:
        raise ApiError(429, str(error), code="overloaded", retry_after=OVERLOADED_RETRY_SECONDS) from None
    except EngineUnavailable as error:
        raise ApiError(503, str(error), code="engine_unavailable", retry_after=OVERLOADED_RETRY_SECONDS) from None


async def _exhaust(deltas: AsyncGenerator[Any, None]) -> None:
    async with aclosing(deltas):
        async for _ in deltas:
            pass


async def _events(
    context: Context, work: Work, generation: Generation, choices: list[Choice], include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks as the tokens come, then usage if asked for. An error is a chunk too: the status line is long gone."""
    begun: set[int] = set()
    usage_field: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        async with aclosing(advance(generation, choices, context.metrics)) as deltas:
            async for choice, delta in deltas:
                chunk = work.renderer.chunk(choice, delta, first=choice.index not in begun)
                begun.add(choice.index)
                if chunk is not None:
                    yield chunk | usage_field
    except (GenerationFailed, EngineUnavailable) as error:
        yield error_body(500, str(error), code="generation_failed")
        return
    if include_usage:
        yield work.renderer.usage_chunk(usage_of(choices, work.body.choices))
