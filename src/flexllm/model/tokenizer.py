"""Text to token ids and back: the model's tokenizer and chat template, and text that appears token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexllm.model.config import ModelConfig

_REPLACEMENT = "\ufffd"  # what decoders show for bytes that are not (yet) UTF-8
_CONTEXT_IDS = 8  # prompt tokens the first output token is decoded after; decides about its leading space


class Tokenizer:
    """The tokenizer of a model folder. Raises ValueError if it cannot be loaded."""

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        # AutoTokenizer may rebuild the tokenizer from the class that tokenizer_config.json names, with that class's
        # pre-tokenizer (SmolLM2 names GPT2Tokenizer, which does not cut digits apart). tokenizer.json is what was trained.
        kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        try:
            self._hf: PreTrainedTokenizerFast = kind.from_pretrained(folder)
            self._backend = self._hf.backend_tokenizer
        except Exception as error:  # a damaged tokenizer.json surfaces as any of half a dozen types
            raise ValueError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
        eos_ids = ModelConfig.from_hf(folder).eos_ids if (folder / "config.json").is_file() else ()
        if not eos_ids and self._hf.eos_token_id is not None:
            eos_ids = (self._hf.eos_token_id,)
        self.eos_ids: tuple[int, ...] = eos_ids
        self.vocab_size: int = len(self._hf)  # ids the tokenizer knows; the model's matrix may be padded beyond
        self._added = {i: token.content for i, token in self._hf.added_tokens_decoder.items()}
        self._byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        self._byte_of = _byte_of_char()

    @property
    def chat_template(self) -> str | None:
        template = self._hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Special tokens written in the text become their ids; `add_special` adds what the model wants around (BOS)."""
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation. Raises ValueError if the model has no template, or its template refuses the messages."""
        if self.chat_template is None:
            raise ValueError("the model has no chat template; use plain completions")
        try:
            text = self._hf.apply_chat_template(
                [dict(m) for m in messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:  # the template is a program of the model's author and may raise anything
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        return self.encode(str(text))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (a part of a character, maybe); empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(bytes([self._byte_of[c]]) if c in self._byte_of else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's byte fallback
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode(errors="replace")


def _byte_of_char() -> dict[str, int]:
    """The inverse of byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _TextStream:
    """Tokens in, finished text out; a character is never cut."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        context = list(prompt_ids[-_CONTEXT_IDS:])
        if tokenizer.decode(context).endswith(_REPLACEMENT):  # the prompt ends within a character
            context = []
        self._tokenizer = tokenizer
        self._shown = context  # the ids of the text shown last: what follows is decoded after them
        self._pending: list[int] = []  # ids since
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer._backend, token_id)
        except Exception:  # invalid UTF-8 made the decoder read text already shown in another way (byte fallback): start afresh
            text = self._tokenizer.decode(self._pending)
            self._stream = DecodeStream(ids=list(self._pending), skip_special_tokens=True)
        if text is None:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text of an unfinished character (U+FFFD)."""
        decode = self._tokenizer.decode
        text = decode([*self._shown, *self._pending])[len(decode(self._shown)) :]
        self._pending = []
        return text


class IncrementalDetokenizer:
    """The text of one generation as its tokens arrive, up to the first stop string, which is cut out.

    Text that might be the beginning of a stop string is held back until it is decided. `prompt_ids` precede the first token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        if not all(stop):
            raise ValueError("stop strings must not be empty")
        self.text = ""  # everything returned so far
        self.stopped = False
        self._stop = tuple(stop)
        self._stream = _TextStream(tokenizer, prompt_ids)
        self._held = ""

    def push(self, token_id: int) -> str:
        """Newly finished text, maybe empty. After a stop string nothing more comes."""
        return "" if self.stopped else self._release(self._stream.push(token_id), final=False)

    def flush(self) -> str:
        """What was held back, at the end of the generation."""
        return "" if self.stopped else self._release(self._stream.flush(), final=True)

    def _release(self, new: str, final: bool) -> str:
        held = self._held + new
        starts = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            free = min(starts)
        else:
            free = len(held) if final else len(held) - self._undecided(held)
        self._held = held[free:]
        self.text += held[:free]
        return held[:free]

    def _undecided(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop string."""
        longest = min(len(held), max((len(s) for s in self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in self._stop)), 0)
