"""Completions in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flexllm.core import TokenLogprob
from flexllm.server.choices import Choice, Delta

if TYPE_CHECKING:
    from flexllm.model.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Renderer(Protocol):
    id: str

    def full(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]: ...
    def chunk(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any] | None:
        """None when the delta brings nothing to show. `first`: of this choice."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]: ...


def usage_of(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """`choices` are prompts x n; a prompt counts once."""
    prompt_tokens = sum(len(c.prompt.ids) for c in choices[::n])
    completion_tokens = sum(c.num_tokens for c in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(c.num_cached for c in choices[::n])},
    }


class _Base:
    def __init__(self, prefix: str, kind: str, chunk_kind: str, model: str, tokenizer: Tokenizer) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._kind, self._chunk_kind, self._model, self._tokenizer = kind, chunk_kind, model, tokenizer

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._envelope(self._chunk_kind, []) | {"usage": usage}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class ChatRenderer(_Base):
    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        super().__init__("chatcmpl", "chat.completion", "chat.completion.chunk", model, tokenizer)

    def full(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        rendered = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._envelope(self._kind, rendered) | {"usage": usage}

    def chunk(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any] | None:
        if not (first or delta.text or delta.logprobs or delta.finish_reason):
            return None
        content: dict[str, Any] = {"role": "assistant"} if first else {}
        if first or delta.text:
            content["content"] = delta.text
        rendered = {
            "index": choice.index,
            "delta": content,
            "logprobs": self._logprobs(choice, delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        return self._envelope(self._chunk_kind, [rendered])

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if choice.sampling.logprobs is None:
            return None
        content = []
        for entry in entries:
            top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
            content.append(self._token(entry.token_id, entry.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}


class CompletionRenderer(_Base):
    def __init__(self, model: str, tokenizer: Tokenizer, echo: bool) -> None:
        super().__init__("cmpl", "text_completion", "text_completion", model, tokenizer)
        self._echo = echo
        self._offsets: dict[int, int] = {}  # choice index -> characters of its tokens rendered so far

    def full(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        rendered = [self._choice(c, c.text, c.logprobs, c.finish_reason, with_prompt=self._echo) for c in choices]
        return self._envelope(self._kind, rendered) | {"usage": usage}

    def chunk(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any] | None:
        with_prompt = first and self._echo
        if not (first or delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._envelope(self._kind, [self._choice(choice, delta.text, delta.logprobs, delta.finish_reason, with_prompt=with_prompt)])

    def _choice(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None, *, with_prompt: bool
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.prompt.text + text if with_prompt else text,
            "logprobs": self._logprobs(choice, logprobs, with_prompt) if choice.sampling.logprobs is not None else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob], with_prompt: bool) -> dict[str, Any]:
        """One list per field. The prompt's first token has no probability: nothing comes before it."""
        prompt = list(zip(choice.prompt.ids, choice.prompt_logprobs or (), strict=False)) if with_prompt else []
        entries: list[tuple[int, TokenLogprob | None]] = [*prompt, *((entry.token_id, entry) for entry in logprobs)]
        tokens = [self._tokenizer.token_text(token_id) for token_id, _ in entries]
        offset = self._offsets.get(choice.index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[choice.index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST_LOGPROB) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best alternatives, and the token itself."""
        top = dict(entry.top) | {entry.token_id: entry.logprob}
        return {self._tokenizer.token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in top.items()}
