"""Logits equal Hugging Face's: whole prompts, prompts in chunks, decode rows, and all of these in one batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexllm.core import InferenceChunk, Request
from tests.oracle.harness import FAMILIES, VOCAB, Bench, random_hf_model

TOLERANCE = 1e-4  # fp32, absolute


def forced_request(bench: Bench, number: int, ids: list[int], prompt: int) -> Request:
    """A request whose outputs are given: ids[:prompt] is its prompt, the rest are decoded."""
    request = bench.request(number, len(ids), random.Random(0))
    request.prompt_ids, request.output_ids = ids[:prompt], ids[prompt:]
    return request


def rows_of(request: Request, rng: random.Random | None) -> list[InferenceChunk]:
    """The prompt at once (no `rng`) or in chunks of random sizes, then one row per output token."""
    chunks, at, prompt = [], 0, len(request.prompt_ids)
    while at < prompt:
        end = prompt if rng is None else min(prompt, at + rng.randint(1, 24))
        chunks.append(InferenceChunk(request, at, end, end == prompt))
        at = end
    return chunks + [InferenceChunk(request, i, i + 1, True) for i in range(prompt, request.num_tokens)]


def token_ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(n)]


@torch.no_grad()
def assert_close_to(hf: torch.nn.Module, ids: list[int], logits: torch.Tensor) -> None:
    want = hf(input_ids=torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float32
    assert float((logits - want).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reference_ops", [True, False], ids=["reference", "device"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_prefill_then_decode(family: str, reference_ops: bool, chunked: bool, tmp_path: Path) -> None:
    rng = random.Random(family)
    hf = random_hf_model(family, tmp_path, torch.float32)
    bench = Bench(tmp_path, torch.float32, reference_ops)
    ids = token_ids(rng, 150)  # beyond the 64 positions that the llama3 scaling of RoPE starts from
    request = forced_request(bench, 0, ids, prompt=120)
    logits = [bench.logits([chunk]) for chunk in rows_of(request, rng if chunked else None)]
    assert_close_to(hf, ids, torch.cat(logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reference_ops", [True, False], ids=["reference", "device"])
def test_continuous_batch(family: str, reference_ops: bool, tmp_path: Path) -> None:
    """Six requests that come and go: decode rows of some share each batch with prefill chunks of others."""
    rng = random.Random(family)
    hf = random_hf_model(family, tmp_path, torch.float32)
    bench = Bench(tmp_path, torch.float32, reference_ops, num_blocks=128)
    texts = [token_ids(rng, rng.randint(20, 110)) for _ in range(6)]
    requests = [forced_request(bench, i, ids, prompt=rng.randint(1, len(ids))) for i, ids in enumerate(texts)]
    todo = {r.id: rows_of(r, rng) for r in requests}
    logits: dict[str, list[torch.Tensor]] = {r.id: [] for r in requests}
    while any(todo.values()):
        ready = [rows for rows in todo.values() if rows]
        batch = [rows.pop(0) for rows in rng.sample(ready, rng.randint(1, len(ready)))]
        batch.sort(key=lambda chunk: not chunk.is_decode)
        parts = bench.logits(batch).split([chunk.rows for chunk in batch])
        for chunk, part in zip(batch, parts, strict=True):
            logits[chunk.request.id].append(part)
    for request, ids in zip(requests, texts, strict=True):
        assert_close_to(hf, ids, torch.cat(logits[request.id]))


def test_sharded_weights(tmp_path: Path) -> None:
    hf = random_hf_model("qwen2", tmp_path / "whole", torch.float32)
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ids = token_ids(random.Random(0), 40)
    bench = Bench(tmp_path / "sharded", torch.float32)
    assert_close_to(hf, ids, torch.cat([bench.logits([c]) for c in rows_of(forced_request(bench, 0, ids, 30), None)]))
