"""From tokens to text: one `Choice` per request in the engine, its detokenizer, stop strings and log probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexllm.core import INTERACTIVE, FinishReason, SamplingParams, TokenLogprob, TokenOutput
from flexllm.server.engine_client import Generation

if TYPE_CHECKING:
    from flexllm.model.tokenizer import Tokenizer
    from flexllm.server.metrics import Metrics


class GenerationFailed(RuntimeError):
    """The engine gave a request up."""


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str = ""  # for `echo`


@dataclass(frozen=True)
class Delta:
    """What one more token added to a choice. `text` may be empty: part of a character, or maybe of a stop string."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass
class Choice:
    index: int
    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    tokenizer: Tokenizer
    arrival: float
    adapter: str | None = None
    priority: str = INTERACTIVE
    hide_tokens: bool = False  # what is sampled is not wanted (echo with max_tokens = 0)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_tokens: int = 0
    num_cached: int = 0
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        from flexllm.model.tokenizer import IncrementalDetokenizer

        self._detokenizer = IncrementalDetokenizer(self.tokenizer, self.sampling.stop)

    def push(self, output: TokenOutput) -> Delta:
        """Raises GenerationFailed."""
        if output.error is not None:
            raise GenerationFailed(output.error)
        logprobs: tuple[TokenLogprob, ...] = ()
        text = ""
        if output.token_id is not None:
            self._count(output)
            # The token that ends a sequence has no text.
            if output.finish_reason is not FinishReason.STOP and not self.hide_tokens:
                text = self._detokenizer.push(output.token_id)
                logprobs = (output.logprob,) if output.logprob is not None and self.sampling.logprobs is not None else ()
        if self._detokenizer.stopped:
            self.finish_reason = FinishReason.STOP.value
        elif output.finish_reason is not None:
            text += self._detokenizer.flush()
            self.finish_reason = output.finish_reason.value
        self.text += text
        self.logprobs.extend(logprobs)
        return Delta(text, logprobs, self.finish_reason)

    def _count(self, output: TokenOutput) -> None:
        self.last_token = time.monotonic()
        self.num_tokens += not self.hide_tokens
        if self.first_token is None:
            self.first_token = self.last_token
            self.num_cached = output.num_cached
            self.prompt_logprobs = output.prompt_logprobs


async def advance(generation: Generation, choices: Sequence[Choice], metrics: Metrics) -> AsyncGenerator[tuple[Choice, Delta], None]:
    """Every token of the choices as it comes, metered; whatever ends the iteration early aborts the rest in the engine.

    Raises GenerationFailed or EngineUnavailable.
    """
    by_id = {choice.request_id: choice for choice in choices}
    for choice in choices:
        metrics.request_began(choice)
    try:
        async with aclosing(generation.outputs()) as outputs:
            async for output in outputs:
                choice = by_id[output.request_id]
                previous = choice.last_token
                delta = choice.push(output)
                if previous is not None and choice.last_token is not None and output.token_id is not None:
                    metrics.token_gap(choice.last_token - previous)
                if delta.finish_reason is not None:
                    generation.abort(choice.request_id)  # nothing to do unless a stop string ended it
                yield choice, delta
    finally:
        generation.close()
        for choice in choices:
            metrics.request_ended(choice)
