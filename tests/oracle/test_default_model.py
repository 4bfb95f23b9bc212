"""The default model trained for 30 steps, here and by Hugging Face + PEFT; then each reads the other's adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from flexllm.config import FinetuneConfig, LoraConfig
from flexllm.core import JobStatus
from flexllm.model import default_model
from tests.oracle.engines import (
    Run,
    Text,
    assert_idle,
    default_hf_model,
    engine_logits,
    job_spec,
    open_engine,
    oracle_logits,
    random_adapter,
    train_oracle,
    with_adapter,
)
from tests.oracle.texts import LESSONS

LORA = LoraConfig(r=8, lora_alpha=16)
CONFIG = FinetuneConfig(learning_rate=2e-4, num_epochs=6, batch_size=2, lr_schedule="cosine", warmup_ratio=0.1, seed=3)
STEPS = 30


def lessons() -> list[Text]:
    """All but the first four tokens of each are to be learnt, at most 64."""
    tokenizer = AutoTokenizer.from_pretrained(default_model.folder())
    ids = [tokenizer(lesson)["input_ids"][:64] for lesson in LESSONS]
    return [(tokens, [i >= 4 for i in range(len(tokens))]) for tokens in ids]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "tolerance", "logit_tolerance"), [("float32", 1e-3, 1e-3), ("bfloat16", 2e-2, None)])
def test_thirty_steps(dtype: str, tolerance: float, logit_tolerance: float | None, tmp_path: Path) -> None:
    texts = lessons()
    hf = default_hf_model(getattr(torch, dtype))
    start = random_adapter(hf, tmp_path / "start", LORA, seed=0, spread=0.01)
    twin = with_adapter(hf, start, trainable=True)
    curve = train_oracle(twin, texts, CONFIG)
    assert len(curve.losses) == STEPS
    assert sum(curve.losses[-5:]) < 0.9 * sum(curve.losses[:5]), "an epoch at the end against one at the start"

    run = Run(open_engine(None, dtype), check=False)
    spec = job_spec("job", tmp_path, texts, CONFIG, LORA, init_adapter=str(start))
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    assert run.losses("job") == pytest.approx(curve.losses, abs=tolerance)
    assert [e.learning_rate for e in run.of("job")] == pytest.approx(curve.rates, rel=1e-9)
    assert_idle(run.engine)
    if logit_tolerance is None:
        return
    ids = texts[0][0]
    twin.save_pretrained(tmp_path / "theirs")
    run.engine.register_adapter("theirs", tmp_path / "theirs")
    assert float((engine_logits(run.engine, ids, "theirs") - oracle_logits(twin, ids)).abs().max()) <= logit_tolerance
    ours = f"{spec.output_dir}/checkpoint-{STEPS}"
    run.engine.register_adapter("ours", ours)
    twin.load_adapter(ours, "ours")
    twin.set_adapter("ours")
    assert float((engine_logits(run.engine, ids, "ours") - oracle_logits(twin, ids)).abs().max()) <= logit_tolerance
