"""Training data: JSONL files of examples to flat arrays of token ids and labels.

An example is one of `{"messages": [{"role", "content", "weight"?}]}` (loss on the assistant turns, up to and including
the token that ends the turn; `weight` 0 takes a turn out of the loss), `{"prompt", "completion"}` (loss on the
completion and the end-of-sequence token) and `{"text"}` (loss everywhere). A file holds one per line, or is one JSON array.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flexllm.files import atomic_file

if TYPE_CHECKING:
    from flexllm.model.tokenizer import Tokenizer

IGNORE = -100  # the label of a row without a loss, as in torch and transformers
ROLES = ("system", "user", "assistant")
MAX_REPORTED = 20


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    weight: int = 1  # 0: no loss on this turn


@dataclass(frozen=True, slots=True)
class ChatExample:
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CompletionExample:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextExample:
    text: str


Example = ChatExample | CompletionExample | TextExample


# --------------------------------------------------------------------------------------------------------- reading files
def iter_examples(path: str | Path) -> Iterator[tuple[str, Example]]:
    """(place, example), streaming; the place is "line N", or "item N" of a JSON array. ValueError "line N: reason" at a bad one."""
    for place, record in _records(Path(path)):
        try:
            yield place, parse_example(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def validate_file(path: str | Path) -> list[str]:
    """What is wrong with a training file, at most 20 lines of "line N: reason"; empty if nothing is."""
    found = islice(_errors(Path(path)), MAX_REPORTED + 1)
    errors = list(found)
    if len(errors) > MAX_REPORTED:
        errors[MAX_REPORTED] = f"more than {MAX_REPORTED} bad lines; the rest is not listed"
    return errors


def _errors(path: Path) -> Iterator[str]:
    empty = True
    for place, record in _records(path):
        empty = False
        try:
            parse_example(record)
        except ValueError as error:
            yield f"{place}: {error}"
    if empty:
        yield "the file has no examples"


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, raw line or parsed item). Blank lines count but are passed over."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        if _is_array(file):
            try:
                items = json.loads(file.read())
            except (ValueError, RecursionError) as error:
                yield f"line {getattr(error, 'lineno', 1)}", error
                return
            yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
        else:
            yield from ((f"line {i}", line) for i, line in enumerate(file, 1) if line.strip())


def _is_array(file: BinaryIO) -> bool:
    """Whether the first character is a bracket; the position is kept."""
    begin = file.tell()
    first = next((line.strip()[:1] for line in file if line.strip()), b"")
    file.seek(begin)
    return first == b"["


def parse_example(record: Any) -> Example:
    """A raw line, or an object parsed from JSON. ValueError gives the reason, without the line number."""
    if isinstance(record, (bytes, str)):
        try:
            record = json.loads(record)
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        except (ValueError, RecursionError) as error:
            record = error
    if isinstance(record, Exception):
        raise ValueError(f"not valid JSON ({getattr(record, 'msg', None) or record})")
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {_kind(record)}")
    if "messages" in record:
        _only(record, {"messages"})
        return ChatExample(_messages(record["messages"]))
    if "prompt" in record or "completion" in record:
        _only(record, {"prompt", "completion"})
        return CompletionExample(_text(record, "prompt"), _text(record, "completion"))
    if "text" in record:
        _only(record, {"text"})
        return TextExample(_text(record, "text"))
    raise ValueError("needs 'messages', or 'prompt' and 'completion', or 'text'")


def _messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list with at least one message, got {_kind(messages)}")
    parsed = []
    for i, message in enumerate(messages):
        try:
            parsed.append(_message(message))
        except ValueError as error:
            raise ValueError(f"messages[{i}]: {error}") from None
    assistant = [m for m in parsed if m.role == "assistant"]
    if not assistant:
        raise ValueError("no message with role 'assistant', so there is nothing to learn")
    if not any(m.weight for m in assistant):
        raise ValueError("every assistant message has weight 0, so there is nothing to learn")
    return tuple(parsed)


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"must be an object, got {_kind(message)}")
    _only(message, {"role", "content", "weight"})
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    weight = message.get("weight")
    if weight is not None and role != "assistant":
        raise ValueError(f"weight is for assistant messages, not for role {role!r}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"weight must be 0 or 1, got {weight!r}")
    return Message(role, _text(message, "content"), 1 if weight is None else int(weight))


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f"{key!r} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {_kind(value)}")
    if not value:
        raise ValueError(f"{key!r} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{key!r} holds half a surrogate pair, which is no text")
    return value


def _only(record: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(record) - known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known here: {', '.join(sorted(known))}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else "an empty list" if value == [] else names[type(value)]


# ---------------------------------------------------------------------------------------------------------- tokenization
@dataclass(slots=True)
class DataReport:
    """What a file held and what became of it. examples = usable + too_long + unlabelled."""

    examples: int = 0
    usable: int = 0
    truncated: int = 0  # usable, but cut to max_seq_length
    too_long: int = 0  # left out (`truncate` off)
    unlabelled: int = 0  # left out: after the cut no label was left
    tokens: int = 0  # rows to run per epoch
    labels: int = 0  # rows with a loss


def tokenize_file(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_length: int,
    truncate: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenizedDataset, DataReport]:
    """Read, template and tokenize a training file. `max_seq_length` counts an example's tokens up to its last label.

    `progress` is called with the number of examples read. ValueError: a bad line (by number), a chat example without a
    chat template or with one whose assistant turns cannot be told apart, or no usable example in the whole file.
    """
    report, builder = DataReport(), _Builder()
    for place, example in iter_examples(path):
        try:
            ids, scored = tokenize(example, tokenizer)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        report.examples += 1
        end = _last(scored) + 1
        if end > max_seq_length and truncate:
            end = _last(scored[:max_seq_length]) + 1
            report.truncated += end > 1
        if end > max_seq_length:
            report.too_long += 1
        elif end <= 1:
            report.unlabelled += 1
        else:
            builder.add(ids[:end], scored[:end])
        if progress and report.examples % 100 == 0:
            progress(report.examples)
    if not builder.sizes:
        raise ValueError(_no_examples(report, max_seq_length))
    dataset = builder.build()
    report.usable, report.tokens, report.labels = len(dataset), dataset.total_tokens, sum(dataset.label_counts)
    if progress:
        progress(report.examples)
    return dataset, report


def tokenize(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(token ids, whether each token is to be learnt). The first token never is: nothing comes before it."""
    if isinstance(example, ChatExample):
        return _tokenize_chat(example.messages, tokenizer)
    end = [tokenizer.eos_ids[0]] if tokenizer.eos_ids else []
    if isinstance(example, CompletionExample):
        # Separately, as at inference, where the prompt is tokenized before the completion exists.
        prompt = tokenizer.encode(example.prompt, add_special=True)
        completion = tokenizer.encode(example.completion) + end
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    ids = tokenizer.encode(example.text, add_special=True) + end
    return ids, [False] + [True] * (len(ids) - 1)


def _tokenize_chat(messages: tuple[Message, ...], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template; give {'prompt', 'completion'} or {'text'} examples")
    plain = [{"role": m.role, "content": m.content} for m in messages]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=False)
    scored = [False] * len(ids)
    for i, message in enumerate(messages):
        if message.role == "assistant" and message.weight:
            begin, end = _assistant_span(plain, i, ids, tokenizer)
            scored[begin:end] = [True] * (end - begin)
    return ids, scored


def _assistant_span(messages: list[dict[str, str]], i: int, ids: list[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """Where the reply messages[i] stands in `ids`, the rendering of all messages: [begin, end), end of turn included.

    It begins where the prompt that asks for it ends, so that training sees what inference will (at the very start, if
    the conversation opens with it). It ends with the first end-of-sequence token, or, for templates that write none,
    where the rendering up to this message ends.
    """
    prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True) if i else []
    begin = _common_prefix(prompt, ids)
    # The last token of the prompt may merge with the first of the reply ("\n" and "\n..."); what merged is learnt.
    if begin < len(prompt) - 1:
        raise ValueError(
            f"the chat template writes the conversation before messages[{i}] differently once the reply is there, so the "
            "reply cannot be told apart; give {'prompt', 'completion'} examples"
        )
    eos = next((p for p in range(begin, len(ids)) if ids[p] in tokenizer.eos_ids), None)
    if eos is not None:
        return begin, eos + 1
    rendered = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
    return begin, _common_prefix(rendered, ids)


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last(scored: list[bool]) -> int:
    """Index of the last True past the first token; 0 if there is none."""
    return next((i for i in range(len(scored) - 1, 0, -1) if scored[i]), 0)


def _no_examples(report: DataReport, max_seq_length: int) -> str:
    if not report.examples:
        return "the file has no examples"
    return (
        f"none of the {report.examples} examples can be used: {report.too_long} are longer than max_seq_length "
        f"{max_seq_length}, {report.unlabelled} have no label left"
    )


# --------------------------------------------------------------------------------------------------------------- storage
@dataclass(slots=True)
class _Builder:
    ids: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    sizes: list[int] = field(default_factory=list)

    def add(self, ids: list[int], scored: list[bool]) -> None:
        """Labels are shifted here: row i predicts token i + 1, and the last token has no row."""
        self.ids.extend(ids[:-1])
        self.labels.extend(token if s else IGNORE for token, s in zip(ids[1:], scored[1:], strict=True))
        self.sizes.append(len(ids) - 1)

    def build(self) -> TokenizedDataset:
        offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        return TokenizedDataset(np.array(self.ids, np.int32), np.array(self.labels, np.int32), offsets)


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Examples one after another; example i is rows offsets[i] .. offsets[i + 1].

    Invariant: every example has at least one row, and its last row has a label.
    """

    ids: np.ndarray  # [rows] int32
    labels: np.ndarray  # [rows] int32: the target of that row; -100 has no loss
    offsets: np.ndarray  # [examples + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of one example, int32, views."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[rows], self.labels[rows]

    @cached_property
    def lengths(self) -> list[int]:
        """Rows per example."""
        return np.diff(self.offsets).tolist()

    @cached_property
    def label_counts(self) -> list[int]:
        """Rows with a loss, per example."""
        return np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64).tolist()

    @property
    def total_tokens(self) -> int:
        return len(self.ids)

    def save(self, path: str | Path) -> None:
        """Write an .npz, whole or not at all. StorageError when the disk refuses."""
        with atomic_file(Path(path)) as part, part.open("wb") as file:
            np.savez(file, ids=self.ids, labels=self.labels, offsets=self.offsets)

    @classmethod
    def load(cls, path: str | Path) -> TokenizedDataset:
        """ValueError for a file that `save` did not write."""
        try:
            with np.load(path, allow_pickle=False) as file:
                dataset = cls(file["ids"], file["labels"], file["offsets"])
        except FileNotFoundError:
            raise ValueError(f"{path}: no such tokenized dataset") from None
        except Exception as error:  # zipfile, numpy and zlib each have their own
            raise ValueError(f"{path}: not a tokenized dataset, or damaged ({error})") from error
        offsets = dataset.offsets
        whole = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(dataset.ids) == len(dataset.labels)
        if not whole or not (np.diff(offsets) > 0).all():
            raise ValueError(f"{path}: not a tokenized dataset, or damaged (its parts do not fit together)")
        return dataset
