"""Offline use: generation, chat, finetuning, and an adapter that goes from one to the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm import LLM, LoraConfig, SamplingParams
from flexllm.config import FinetuneConfig
from flexllm.core import JobEvent

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
TRAIN = FinetuneConfig(learning_rate=0.02, num_epochs=6, batch_size=2, lr_schedule="constant", warmup_ratio=0.0)
EXAMPLES = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "lime"}]}
    for question in ("colour?", "which colour?", "the colour?", "what colour?")
]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), dtype="float32", threads=1) as llm:
        yield llm


def test_greedy_generation_is_that_of_transformers(llm: LLM, tiny_llama: Path):
    oracle = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompts = ["hello", "a longer prompt than the others", "x"]
    completions = llm.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = llm.tokenizer.encode(prompt)
        expected = oracle.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=1)
        assert list(completion.token_ids) == expected[0, len(ids) :].tolist()
        assert completion.prompt_tokens == len(ids)
        assert completion.finish_reason in ("stop", "length")


def test_prompts_may_be_one_text_or_token_ids(llm: LLM):
    (one,) = llm.generate("hello", GREEDY)
    (ids,) = llm.generate([llm.tokenizer.encode("hello")], GREEDY)
    assert one == ids


def test_each_prompt_may_have_its_own_sampling(llm: LLM):
    short, long = llm.generate(["hello", "hello"], [SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True), GREEDY])
    assert len(short.token_ids) == 2
    assert short.finish_reason == "length"
    assert long.token_ids[:2] == short.token_ids
    with pytest.raises(ValueError, match="2 prompts but 1 SamplingParams"):
        llm.generate(["a", "b"], [GREEDY])


def test_a_stop_string_ends_the_text_and_is_cut_out(llm: LLM):
    sampling = SamplingParams(max_tokens=64, seed=1, ignore_eos=True)
    (free,) = llm.generate("hello", sampling)
    stop = free.text[8:10]
    begin = free.text.index(stop)
    (stopped,) = llm.generate("hello", SamplingParams(max_tokens=64, seed=1, ignore_eos=True, stop=(stop,)))
    assert stopped.text == free.text[:begin]
    assert stopped.finish_reason == "stop"


def test_logprobs_come_when_asked_for(llm: LLM):
    (plain,) = llm.generate("hello", GREEDY)
    (scored,) = llm.generate("hello", SamplingParams(max_tokens=12, temperature=0.0, logprobs=2))
    assert plain.logprobs is None
    assert scored.logprobs is not None
    assert [entry.token_id for entry in scored.logprobs] == list(scored.token_ids)
    assert all(entry.top[0][0] == entry.token_id for entry in scored.logprobs)  # greedy takes the best


def test_streaming_gives_the_same_text_in_pieces(llm: LLM):
    (whole,) = llm.generate("hello", GREEDY)
    pieces = list(llm.stream("hello", GREEDY))
    assert "".join(pieces) == whole.text


def test_an_abandoned_stream_leaves_nothing_in_the_engine(llm: LLM):
    stream = llm.stream("hello", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm._engine.has_work
    assert llm.generate("hello", GREEDY)[0].token_ids


def test_a_prompt_beyond_the_context_is_refused_and_leaves_nothing(llm: LLM):
    with pytest.raises(ValueError, match=r"\d+ tokens"):
        llm.generate(["short", "x" * 300], GREEDY)
    assert not llm._engine.has_work


def test_chat_takes_one_conversation_or_several(llm: LLM):
    conversation = [{"role": "user", "content": "hello"}]
    (one,) = llm.chat(conversation, GREEDY)
    assert llm.chat([conversation, conversation], GREEDY) == [one, one]


def test_what_is_finetuned_is_generated(llm: LLM, tmp_path: Path):
    events: list[JobEvent] = []
    adapter = llm.finetune(EXAMPLES, LoraConfig(r=4), TRAIN, output_dir=tmp_path / "adapter", valid=EXAMPLES[:1], callback=events.append)
    assert len(adapter.losses) == 12
    assert adapter.losses[-1] < adapter.losses[0] / 2
    assert adapter.report.usable == 4
    assert tuple(events) == adapter.history
    assert [e.step for e in events if e.kind == "step"] == list(range(1, 13))
    assert any(e.kind == "validation" for e in events)
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert not list(adapter.path.glob(".*"))  # no half-written files

    question = [{"role": "user", "content": "which colour?"}]
    (base,) = llm.chat(question, GREEDY)
    (finetuned,) = llm.chat(question, GREEDY, adapter=adapter)
    (by_path,) = llm.chat(question, GREEDY, adapter=adapter.path)
    assert finetuned.text == "lime"
    assert finetuned.finish_reason == "stop"
    assert by_path == finetuned
    assert base.text != "lime"
    assert llm.chat(question, GREEDY) == [base]  # the base model is what it was


def test_training_can_go_on_from_an_adapter(llm: LLM, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    first = llm.finetune(path, LoraConfig(r=4), TRAIN, output_dir=tmp_path / "first")
    more = llm.finetune(path, LoraConfig(r=4), TRAIN, output_dir=tmp_path / "more", init_adapter=first)
    assert more.losses[0] < first.losses[0] / 2


def test_an_adapter_written_anew_is_loaded_anew(llm: LLM, tmp_path: Path):
    question = [{"role": "user", "content": "which colour?"}]
    once = FinetuneConfig(max_steps=1, learning_rate=1e-6)
    adapter = llm.finetune(EXAMPLES, LoraConfig(r=4), once, output_dir=tmp_path / "adapter")
    (before,) = llm.chat(question, GREEDY, adapter=adapter)
    adapter = llm.finetune(EXAMPLES, LoraConfig(r=4), TRAIN, output_dir=tmp_path / "adapter")
    (after,) = llm.chat(question, GREEDY, adapter=adapter)
    assert before.text != "lime"
    assert after.text == "lime"


def test_a_failing_callback_ends_the_job(llm: LLM, tmp_path: Path):
    def fail(event: JobEvent) -> None:
        raise KeyboardInterrupt(event.step)

    with pytest.raises(KeyboardInterrupt):
        llm.finetune(EXAMPLES, LoraConfig(r=4), TRAIN, output_dir=tmp_path / "adapter", callback=fail)
    assert not llm._engine.has_work


def test_bad_data_and_adapters_are_refused(llm: LLM, tmp_path: Path):
    with pytest.raises(ValueError, match="line 2"):
        llm.finetune([EXAMPLES[0], {"nonsense": 1}], output_dir=tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter_model"):
        llm.generate("hello", GREEDY, adapter=tmp_path)
    adapter = llm.finetune(EXAMPLES, LoraConfig(r=4), FinetuneConfig(max_steps=1), output_dir=tmp_path / "adapter")
    with pytest.raises(ValueError, match="'r': 4"):
        llm.finetune(EXAMPLES, LoraConfig(r=8), output_dir=tmp_path / "more", init_adapter=adapter)
