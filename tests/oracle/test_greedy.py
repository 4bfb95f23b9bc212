"""Greedy continuations of the default model, served together, are those of Hugging Face's generate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from flexllm.config import FinetuneConfig
from flexllm.core import Request, SamplingParams
from flexllm.model import default_model
from flexllm.peft.config import LoraConfig
from tests.oracle.engines import SCHEDULER, Run, assert_idle, assert_same_greedy, default_hf_model, job_spec, open_engine
from tests.oracle.texts import PROMPTS

TOKENS = 64


def requests(prompts: list[list[int]], max_tokens: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [Request(f"r{i}", prompt, sampling, 0.0) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def generate(hf: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """TOKENS more tokens of each prompt, by Hugging Face; padded on the left, and never stopped by the end of a text."""
    hf.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_prompts() -> None:
    """All 20 at once: prefill in chunks of what the decode rows leave of 24 rows, then a batch of 20 decode rows."""
    tokenizer = AutoTokenizer.from_pretrained(default_model.folder())
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    hf = default_hf_model(torch.float32)
    want = generate(hf, prompts)
    run = Run(open_engine(None, scheduler=dataclasses.replace(SCHEDULER, max_batch_tokens=24)), check=False)
    for request in requests(prompts, TOKENS):
        run.add(request)
    run.finish()
    assert any(len(p.inference) > 15 for p in run.plans)
    assert any(c.rows > 1 and not c.sample for p in run.plans for c in p.inference), "some prompts were prefilled in chunks"
    for i, prompt in enumerate(prompts):
        assert_same_greedy(run.tokens[f"r{i}"], want[i], prompt, hf)
    assert_idle(run.engine)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_beside_a_job(tmp_path: Path) -> None:
    """The same answers with and without a job, and the same losses with and without requests."""
    tokenizer = AutoTokenizer.from_pretrained(default_model.folder())
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS[:6]]
    texts = [(ids, [i > 0 for i in range(len(ids))]) for ids in (tokenizer(p + p)["input_ids"] for p in PROMPTS[6:14])]
    config = FinetuneConfig(learning_rate=1e-3, num_epochs=1, batch_size=2)
    engine = open_engine(None)

    def run(name: str, jobs: bool, load: bool) -> Run:
        run = Run(engine, check=False)
        if jobs:
            folder = tmp_path / name
            folder.mkdir()
            engine.add_job(job_spec("job", folder, texts, config, LoraConfig(r=8)))
        run.serve([(6 * i, request) for i, request in enumerate(requests(prompts, 24))] if load else [])
        assert_idle(engine)
        return run

    both, requests_only, job_only = run("both", True, True), run("requests", False, True), run("job", True, False)
    assert both.shared > 10
    hf = default_hf_model(torch.float32)
    for i, prompt in enumerate(prompts):
        assert_same_greedy(both.tokens[f"r{i}"], requests_only.tokens[f"r{i}"], prompt, hf)
    assert len(both.losses("job")) == 4
    assert both.losses("job") == pytest.approx(job_only.losses("job"), abs=1e-4)
