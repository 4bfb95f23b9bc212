"""Adapters travel: what PEFT saved gives the same logits here, and what was trained here gives the same logits in PEFT."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexllm.config import FinetuneConfig
from flexllm.core import JobStatus
from flexllm.peft.config import LINEARS, LoraConfig
from tests.oracle.engines import Run, engine_logits, job_spec, open_engine, oracle_logits, random_adapter, random_texts, with_adapter
from tests.oracle.harness import VOCAB, random_hf_model

TOLERANCE = 1e-4  # fp32, absolute
ADAPTERS = [
    LoraConfig(r=4, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=7, lora_alpha=3, target_modules=("down_proj",)),
    LoraConfig(r=8, lora_alpha=11, target_modules=LINEARS, use_rslora=True),
]


@pytest.mark.parametrize("family", ["llama3.1", "qwen2", "qwen3"])
@pytest.mark.parametrize("lora", ADAPTERS, ids=["q and v", "down", "all, rslora"])
def test_there_and_back(family: str, lora: LoraConfig, tmp_path: Path) -> None:
    """PEFT's adapter is served here, trained on here, exported, and read by PEFT again."""
    hf = random_hf_model(family, tmp_path / "model", torch.float32)
    theirs = random_adapter(hf, tmp_path / "theirs", lora, seed=1)
    ids = [random.Random(2).randrange(VOCAB) for _ in range(100)]
    base = oracle_logits(hf, ids)
    run = Run(open_engine(tmp_path / "model"))

    def assert_alike(folder: Path) -> torch.Tensor:
        run.engine.register_adapter(folder.name, folder)
        want = oracle_logits(with_adapter(hf, folder), ids)
        assert float((engine_logits(run.engine, ids, folder.name) - want).abs().max()) <= TOLERANCE
        return want

    assert float((assert_alike(theirs) - base).abs().max()) > 100 * TOLERANCE, "the adapter does something"
    texts = random_texts(random.Random(3), [20, 40, 33, 7], VOCAB)
    config = FinetuneConfig(learning_rate=1e-2, num_epochs=4, batch_size=2, warmup_ratio=0.0)
    spec = job_spec("job", tmp_path, texts, config, lora, init_adapter=str(theirs))
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    trained = assert_alike(Path(spec.output_dir) / "checkpoint-8")
    assert float((trained - oracle_logits(with_adapter(hf, theirs), ids)).abs().max()) > 100 * TOLERANCE, "training changed it"
    assert float((engine_logits(run.engine, ids) - base).abs().max()) <= TOLERANCE, "the base model is as it was"


def test_fresh_adapter_starts_as_the_base_model(tmp_path: Path) -> None:
    """PEFT's initialisation: B zero, A uniform with variance 1 / (3 in), different for every seed and the same for one."""
    random_hf_model("llama", tmp_path / "model", torch.float32)
    drawn = []
    for seed in (0, 0, 1):
        engine = open_engine(tmp_path / "model")
        spec = job_spec("job", tmp_path, random_texts(random.Random(0), [9], VOCAB), FinetuneConfig(seed=seed), LoraConfig(r=64))
        engine.add_job(spec)
        drawn.append({n: p.clone() for n, p in engine.adapter_pool.parameters(engine.trainer.jobs["job"].slot).items()})
    for name, p in drawn[0].items():
        assert torch.equal(p, drawn[1][name])
        if name.endswith(".B"):
            assert not p.any()
            continue
        assert not torch.equal(p, drawn[2][name])
        bound = p.shape[1] ** -0.5
        assert float(p.abs().max()) <= bound
        assert float(p.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
