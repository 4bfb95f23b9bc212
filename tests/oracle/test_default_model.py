"""The default model trained for 30 steps, here and by Hugging Face + PEFT; then each reads the other's adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

from flexllm.config import FinetuneConfig
from flexllm.core import JobStatus
from flexllm.engine import Engine
from flexllm.model import default_model
from flexllm.model.config import ModelConfig
from flexllm.model.loader import default_dtype
from flexllm.peft.config import LoraConfig
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
CONFIG = FinetuneConfig(num_epochs=6, batch_size=2, lr_schedule="cosine", warmup_ratio=0.1, seed=3)
STEPS = 30
LOGIT_TOLERANCE = 1e-3


def lessons() -> list[Text]:
    """All but the first four tokens of each are to be learnt, at most 64."""
    tokenizer = AutoTokenizer.from_pretrained(default_model.folder())
    ids = [tokenizer(lesson)["input_ids"][:64] for lesson in LESSONS]
    return [(tokens, [i >= 4 for i in range(len(tokens))]) for tokens in ids]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "learning_rate", "tolerance"), [("float32", 1e-3, 1e-3), ("bfloat16", 1e-4, 2e-2)])
def test_thirty_steps(dtype: str, learning_rate: float, tolerance: float, tmp_path: Path) -> None:
    """At 1e-3 a difference grows from step to step: fine for finding one in fp32, too much for rounding in bf16."""
    if dtype == "bfloat16" and default_dtype(ModelConfig.from_hf(default_model.folder()), "cpu") != torch.bfloat16:
        pytest.skip("no bf16 arithmetic in this CPU: over a quarter of an hour for what the engine would not choose here")
    texts, config = lessons(), dataclasses.replace(CONFIG, learning_rate=learning_rate)
    hf = default_hf_model(getattr(torch, dtype))
    start = random_adapter(hf, tmp_path / "start", LORA, seed=0, spread=0.01)
    twin = with_adapter(hf, start, trainable=True)
    curve = train_oracle(twin, texts, config)
    assert len(curve.losses) == STEPS
    assert sum(curve.losses[-5:]) < 0.95 * sum(curve.losses[:5]), "the last epoch against the first"

    run = Run(open_engine(None, dtype), check=False)
    spec = job_spec("job", tmp_path, texts, config, LORA, init_adapter=str(start))
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    assert run.losses("job") == pytest.approx(curve.losses, abs=tolerance)
    assert [e.learning_rate for e in run.of("job")] == pytest.approx(curve.rates, rel=1e-9)
    assert_idle(run.engine)
    if dtype == "float32":
        assert_adapters_travel(run.engine, twin, f"{spec.output_dir}/checkpoint-{STEPS}", texts[0][0], tmp_path / "theirs")


def assert_adapters_travel(engine: Engine, twin: peft.PeftModel, ours: str, ids: list[int], theirs: Path) -> None:
    """The twin's adapter gives its logits here, and ours gives the engine's logits in PEFT: fp32, logits around 20."""
    twin.save_pretrained(str(theirs))
    engine.register_adapter("theirs", theirs)
    assert float((engine_logits(engine, ids, "theirs") - oracle_logits(twin, ids)).abs().max()) <= LOGIT_TOLERANCE
    engine.register_adapter("ours", ours)
    twin.load_adapter(ours, "ours")
    twin.set_adapter("ours")
    assert float((engine_logits(engine, ids, "ours") - oracle_logits(twin, ids)).abs().max()) <= LOGIT_TOLERANCE
