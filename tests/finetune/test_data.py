"""Training files: what is accepted, what is refused and why, and which tokens carry a loss."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexllm.files import StorageError
from flexllm.finetune.data import (
    IGNORE,
    ChatExample,
    CompletionExample,
    Message,
    TextExample,
    TokenizedDataset,
    iter_examples,
    parse_example,
    tokenize,
    tokenize_file,
    validate_file,
)
from flexllm.model.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer(tiny_llama)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def chat(*turns: tuple[str, str] | tuple[str, str, int]) -> ChatExample:
    return ChatExample(tuple(Message(*t) for t in turns))


def scored_text(example: Any, tokenizer: Tokenizer) -> str:
    ids, scored = tokenize(example, tokenizer)
    return tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s], skip_special=False)


# --------------------------------------------------------------------------------------------------------------- reading
def test_the_three_formats_as_lines_and_as_an_array(tmp_path: Path) -> None:
    records = [CHAT, {"prompt": "2+2=", "completion": "4"}, {"text": "é中🙂"}]
    expected = [chat(("user", "hi"), ("assistant", "hello")), CompletionExample("2+2=", "4"), TextExample("é中🙂")]
    lines = write(tmp_path / "a.jsonl", records[0], "\n", *records[1:])
    assert list(iter_examples(lines)) == list(zip(["line 1", "line 3", "line 4"], expected, strict=True))
    array = write(tmp_path / "b.json", "\n " + json.dumps(records, indent=1))
    assert list(iter_examples(array)) == list(zip(["item 1", "item 2", "item 3"], expected, strict=True))
    assert validate_file(lines) == validate_file(array) == []


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r\n\r\n" + json.dumps(CHAT).encode())
    assert validate_file(path) == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{oops", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("17", "must be a JSON object, got a number"),
        ({"question": "?"}, "needs 'messages', or 'prompt' and 'completion', or 'text'"),
        ({**CHAT, "tools": []}, "unknown key 'tools'"),
        ({"messages": []}, "got an empty list"),
        ({"messages": "hi"}, "got a string"),
        ({"messages": ["hi"]}, "messages[0]: must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]: role must be one of system, user, assistant, got 'robot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "got ['user']"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message with role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0]: 'content' is empty"),
        ({"messages": [{"role": "assistant"}]}, "'content' is missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'content' must be a string, got null"),
        ({"messages": [{"role": "assistant", "content": "x", "name": "y"}]}, "unknown key 'name'"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "weight must be 0 or 1, got 2"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": True}]}, "weight must be 0 or 1, got True"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "weight is for assistant messages"),
        ({"prompt": "x"}, "'completion' is missing"),
        ({"prompt": ["x"], "completion": "y"}, "'prompt' must be a string, got a list"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"text": 1.5}, "'text' must be a string, got a number"),
        ({"text": "\ud800"}, "surrogate"),
    ],
)
def test_bad_lines_are_named_with_number_and_reason(tmp_path: Path, record: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, record if isinstance(record, dict) else record + "\n", CHAT)
    errors = validate_file(path)
    assert len(errors) == 1
    assert errors[0].startswith("line 2: ")
    assert reason in errors[0]
    with pytest.raises(ValueError, match="line 2: "):
        list(iter_examples(path))


def test_empty_undecodable_and_hopeless_files(tmp_path: Path) -> None:
    assert validate_file(write(tmp_path / "empty.jsonl", "\n \n")) == ["the file has no examples"]
    assert validate_file(write(tmp_path / "empty.json", "[]")) == ["the file has no examples"]
    assert validate_file(write(tmp_path / "cut.json", "[\n{},\n"))[0].startswith("line 3: not valid JSON")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}\n")
    assert validate_file(tmp_path / "binary") == ["line 1: not UTF-8"]
    errors = validate_file(write(tmp_path / "many.jsonl", *["nope\n"] * 50))
    assert len(errors) == 21
    assert errors[-1] == "more than 20 bad lines; the rest is not listed"


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_input_breaks_the_parser(record: Any) -> None:
    with suppress(ValueError):
        parse_example(record)


# ---------------------------------------------------------------------------------------------------------- tokenization
def test_chat_loss_is_on_assistant_turns_with_their_end_token(tokenizer: Tokenizer) -> None:
    example = chat(("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert scored_text(example, tokenizer) == "b<|im_end|>d<|im_end|>"
    ids, _ = tokenize(example, tokenizer)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=False)


def test_weight_zero_and_consecutive_turns(tokenizer: Tokenizer) -> None:
    assert scored_text(chat(("user", "a"), ("assistant", "b", 0), ("user", "c"), ("assistant", "d", 1)), tokenizer) == "d<|im_end|>"
    assert scored_text(chat(("assistant", "a"), ("assistant", "b"), ("user", "c")), tokenizer).endswith("a<|im_end|>b<|im_end|>")


def test_completion_and_text(tokenizer: Tokenizer) -> None:
    assert scored_text(CompletionExample("2+2=", "4"), tokenizer) == "4<|im_end|>"
    assert scored_text(TextExample("abc"), tokenizer) == "bc<|im_end|>"  # nothing comes before the a


class StubTokenizer:
    """A template given as a function of the messages; tokens are characters, and '#' ends a turn."""

    chat_template = "stub"
    eos_ids = (ord("#"),)

    def __init__(self, render: Any) -> None:
        self.render = render

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        return [ord(c) for c in self.render(messages, add_generation_prompt)]


def stub_scored(render: Any, *turns: tuple[str, str]) -> str:
    ids, scored = tokenize(chat(*turns), StubTokenizer(render))  # type: ignore[arg-type]
    return "".join(chr(i) for i, s in zip(ids, scored, strict=True) if s)


def test_a_template_without_end_token_learns_up_to_the_end_of_the_turn() -> None:
    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return "".join(f"[{m['role'][0]}:{m['content']}]" for m in messages) + ("[a:" if prompt else "")

    assert stub_scored(render, ("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")) == "y]w]"


def test_a_template_that_writes_earlier_turns_differently_is_still_exact() -> None:
    """As Qwen3's, which shows the (empty) thoughts of the last reply only."""

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        thoughts = ["<t>" if m["role"] == "assistant" and i == len(messages) - 1 else "" for i, m in enumerate(messages)]
        return "".join(f"{m['role'][0]}:{t}{m['content']}#" for m, t in zip(messages, thoughts, strict=True)) + ("a:" if prompt else "")

    assert stub_scored(render, ("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")) == "y#<t>w#"


def test_a_template_whose_past_depends_on_the_reply_is_refused() -> None:
    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return f"{len(messages)} messages: " + "".join(m["content"] + "#" for m in messages) + ("a:" if prompt else "")

    with pytest.raises(ValueError, match=r"before messages\[1\] differently"):
        stub_scored(render, ("user", "x"), ("assistant", "y"))


def test_no_chat_template(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="line 1: the model has no chat template"):
        tokenize_file(write(tmp_path / "a.jsonl", CHAT), tokenizer, 100)


# --------------------------------------------------------------------------------------------------------------- datasets
def test_labels_are_shifted_and_rows_after_the_last_label_trimmed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, {"text": "abc"})
    progress: list[int] = []
    dataset, report = tokenize_file(path, tokenizer, 100, progress=progress.append)
    ids, labels = dataset.example(0)
    tokens, scored = tokenize(parse_example(CHAT), tokenizer)
    length = len(tokens) - 2  # the template's newline after the end token has no loss; the end token is a target only
    assert ids.tolist() == tokens[:length]
    assert labels.tolist() == [t if s else IGNORE for t, s in zip(tokens[1:], scored[1:], strict=True)][:length]
    assert labels[-1] == tokenizer.eos_ids[0]
    assert dataset.lengths == [length, 3]
    assert dataset.label_counts == [len("hello") + 1, 3]
    assert (report.examples, report.usable, report.tokens, report.labels) == (2, 2, length + 3, 9)
    assert progress == [2]


def test_long_examples_are_left_out_or_cut_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long_prompt = {"prompt": "p" * 30, "completion": "c"}
    path = write(tmp_path / "a.jsonl", {"text": "a" * 10}, {"text": "b" * 9}, long_prompt)
    dataset, report = tokenize_file(path, tokenizer, 10)
    assert (len(dataset), report.too_long, report.truncated) == (1, 2, 0)
    assert dataset.lengths == [9]
    dataset, report = tokenize_file(path, tokenizer, 10, truncate=True)
    assert (len(dataset), report.usable, report.too_long, report.truncated, report.unlabelled) == (2, 2, 0, 1, 1)
    assert dataset.lengths == [9, 9]
    assert report.examples == report.usable + report.too_long + report.unlabelled


def test_the_length_limit_ignores_what_comes_after_the_last_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trailing = {"messages": [*CHAT["messages"], {"role": "user", "content": "x" * 200}]}
    dataset, report = tokenize_file(write(tmp_path / "a.jsonl", trailing), tokenizer, 60)
    assert (len(dataset), report.too_long) == (1, 0)


def test_no_usable_example_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no examples"):
        tokenize_file(write(tmp_path / "a.jsonl", "\n"), tokenizer, 10)
    with pytest.raises(ValueError, match="none of the 1 examples can be used: 1 are longer than max_seq_length 10"):
        tokenize_file(write(tmp_path / "b.jsonl", {"text": "a" * 20}), tokenizer, 10)


def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset, _ = tokenize_file(write(tmp_path / "a.jsonl", CHAT, {"text": "abc"}), tokenizer, 100)
    path = tmp_path / "sub" / "data.npz"
    dataset.save(path)
    again = TokenizedDataset.load(path)
    for name in ("ids", "labels", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(dataset, name))
    assert (again.ids.dtype, again.labels.dtype, again.offsets.dtype) == (np.int32, np.int32, np.int64)
    assert [p.name for p in path.parent.iterdir()] == ["data.npz"]


def test_damaged_datasets_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such"):
        TokenizedDataset.load(tmp_path / "none.npz")
    path = tmp_path / "data.npz"
    TokenizedDataset(np.zeros(4, np.int32), np.zeros(4, np.int32), np.array([0, 4])).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        TokenizedDataset.load(path)
    TokenizedDataset(np.zeros(4, np.int32), np.zeros(4, np.int32), np.array([0, 5])).save(path)
    with pytest.raises(ValueError, match="do not fit"):
        TokenizedDataset.load(path)


def test_saving_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        TokenizedDataset(np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([0, 1])).save(tmp_path / "file" / "data.npz")
