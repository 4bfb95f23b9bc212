from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flexllm.model.tokenizer import IncrementalDetokenizer, Tokenizer

MESSAGES = [{"role": "user", "content": "naïve 🙂?"}]
FEW = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer(byte_level_folder)


@pytest.fixture(scope="module")
def byte_fallback(byte_fallback_folder: Path) -> Tokenizer:
    return Tokenizer(byte_fallback_folder)


# ---------------------------------------------------------------------------------------------------------- whole texts
def test_encodes_and_decodes_as_transformers_does(tokenizer: Tokenizer, byte_level_folder: Path) -> None:
    oracle = PreTrainedTokenizerFast.from_pretrained(byte_level_folder)
    text = "the quick <|im_end|> café 中文 12"
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert 2 in ids  # <|im_end|> is one token
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.eos_ids == (2,)


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nnaïve 🙂?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1
    shorter = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert ids[: len(shorter)] == shorter


def test_a_template_that_refuses_and_one_that_is_missing(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    with pytest.raises(ValueError, match="chat template refuses the messages: no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], add_generation_prompt=True)
    assert byte_fallback.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        byte_fallback.apply_chat_template(MESSAGES, add_generation_prompt=True)


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    text = "the café 中文 🙂\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text
    assert tokenizer.token_text(2) == "<|im_end|>"
    ids = byte_fallback.encode("ab é中")
    assert b"".join(byte_fallback.token_bytes(i) for i in ids).decode() == " ab é中"
    assert byte_fallback.token_text(byte_fallback.encode("中")[-1]) == "\ufffd"
    assert tokenizer.token_bytes(10**6) == b""  # a row of a padded embedding


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------- token by token
def run(detokenizer: IncrementalDetokenizer, ids: list[int]) -> str:
    """All that a client would be sent; checks that nothing sent is taken back."""
    sent = ""
    for token_id in ids:
        sent += detokenizer.push(token_id)
        assert detokenizer.text == sent
    sent += detokenizer.flush()
    assert detokenizer.text == sent
    return sent


@FEW
@given(ids=st.lists(st.integers(0, 330), max_size=40))
def test_any_tokens_stream_to_their_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert run(IncrementalDetokenizer(tokenizer), ids) == tokenizer.decode(ids)


@FEW
@given(text=st.text(alphabet="abé中🙂 c<", max_size=30), start=st.integers(0, 5))
def test_text_streams_whole_after_a_prompt(byte_fallback: Tokenizer, text: str, start: int) -> None:
    ids = byte_fallback.encode(text)
    prompt, output = ids[:start], ids[start:]
    streamed = run(IncrementalDetokenizer(byte_fallback, prompt_ids=prompt), output)
    before = byte_fallback.decode(prompt)
    if not before.endswith("\ufffd"):
        assert before + streamed == byte_fallback.decode(ids)


@FEW
@given(ids=st.lists(st.integers(0, 272), max_size=40))
def test_invalid_bytes_never_stop_the_stream(byte_fallback: Tokenizer, ids: list[int]) -> None:
    """Byte fallback turns a whole run of bytes into U+FFFD if its end is invalid; what was sent cannot be taken back."""
    detokenizer = IncrementalDetokenizer(byte_fallback)
    run(detokenizer, [*ids, byte_fallback.encode("c")[-1]])
    assert detokenizer.text.endswith("c")


@FEW
@given(
    text=st.text(alphabet="ab é中🙂", max_size=30),
    stop=st.lists(st.text(alphabet="ab é中🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_end_the_text_and_never_leak(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    sent = run(detokenizer, tokenizer.encode(text))
    assert detokenizer.stopped == any(s in text for s in stop)
    assert not any(s in sent for s in stop)
    assert text.startswith(sent)
    if detokenizer.stopped:
        assert any(text[len(sent) :].startswith(s) for s in stop)
    else:
        assert sent == text


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ("aab",))
    a, b, c = (tokenizer.encode(x)[0] for x in "abc")
    assert [detokenizer.push(t) for t in (a, a, a, c, a)] == ["", "", "a", "aac", ""]
    assert not detokenizer.stopped
    assert [detokenizer.push(t) for t in (a, b, c)] == ["", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""
    assert detokenizer.text == "aaac"


def test_characters_are_never_cut(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    emoji = [next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b])) for b in "🙂".encode()]
    assert [detokenizer.push(t) for t in emoji] == ["", "", "", "🙂"]
    assert detokenizer.push(emoji[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        IncrementalDetokenizer(tokenizer, ("",))
