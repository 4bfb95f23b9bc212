"""A job's whole curve is that of a plain loop over Hugging Face + PEFT: same losses, norms, rates and final adapter."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from flexllm.config import FinetuneConfig
from flexllm.core import JobStatus
from flexllm.peft.config import LoraConfig
from tests.oracle.engines import (
    Curve,
    Run,
    assert_idle,
    final_adapter,
    job_spec,
    open_engine,
    random_adapter,
    random_texts,
    train_oracle,
    with_adapter,
)
from tests.oracle.harness import VOCAB, random_hf_model

LORA = LoraConfig(r=4, lora_alpha=6)
LENGTHS = [5, 40, 2, 61, 17, 33, 28, 9, 50, 12, 3]  # 11 examples: the last group of an epoch is smaller
BASE = FinetuneConfig(learning_rate=5e-3, num_epochs=2, batch_size=4, lr_schedule="constant", warmup_ratio=0.0)
CASES = {
    "plain": BASE,
    "accumulation": dataclasses.replace(BASE, batch_size=2, gradient_accumulation_steps=3),
    "one at a time": dataclasses.replace(BASE, batch_size=1, num_epochs=1),
    "more than there is": dataclasses.replace(BASE, batch_size=16, num_epochs=4),
    "seeded shuffle": dataclasses.replace(BASE, seed=7, num_epochs=3),
    "no shuffle": dataclasses.replace(BASE, shuffle=False),
    "max_steps": dataclasses.replace(BASE, max_steps=5, num_epochs=3, lr_schedule="linear", warmup_ratio=0.3),
    "warmup and cosine": dataclasses.replace(BASE, num_epochs=4, lr_schedule="cosine", warmup_ratio=0.2),
    "linear": dataclasses.replace(BASE, num_epochs=3, lr_schedule="linear", warmup_ratio=0.1),
    "clipping": dataclasses.replace(BASE, max_grad_norm=0.05),
    "no clipping": dataclasses.replace(BASE, max_grad_norm=0.0),
    "weight decay, betas, eps": dataclasses.replace(BASE, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-4),
    "everything kept": dataclasses.replace(BASE, save_level="keep"),
}


def both_curves(folder: Path, config: FinetuneConfig, dtype: torch.dtype) -> tuple[Run, Curve, dict[str, float]]:
    """The same job here and there; and how far apart the final adapters are, relative to each tensor's largest change."""
    hf = random_hf_model("llama", folder / "model", dtype)
    texts = random_texts(random.Random(5), LENGTHS, VOCAB)
    start = random_adapter(hf, folder / "start", LORA, seed=1, spread=0.1)
    twin = with_adapter(hf, start, trainable=True).to(dtype)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    curve = train_oracle(twin, texts, config)
    run = Run(open_engine(folder / "model", str(dtype).removeprefix("torch.")))
    spec = job_spec("job", folder, texts, config, LORA, init_adapter=str(start))
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    assert_idle(run.engine)
    got = final_adapter(spec, len(curve.losses))
    errors = {}
    for name, p in twin.named_parameters():
        if p.requires_grad:
            mine = got.pop(name.replace(".default", ""))
            errors[name] = float((mine - p.detach()).abs().max() / (p.detach() - before[name]).abs().max())
    assert not got, "tensors that PEFT does not have"
    return run, curve, errors


@pytest.mark.parametrize("case", CASES)
def test_curve_in_float64(case: str, tmp_path: Path) -> None:
    run, curve, errors = both_curves(tmp_path, CASES[case], torch.float64)
    steps = run.of("job")
    assert [e.step for e in steps] == list(range(1, len(curve.losses) + 1))
    assert run.losses("job") == pytest.approx(curve.losses, rel=1e-9)
    assert [e.grad_norm for e in steps] == pytest.approx(curve.norms, rel=1e-7)
    assert [e.learning_rate for e in steps] == pytest.approx(curve.rates, rel=1e-12)
    assert max(errors.values()) < 1e-6
    assert max(len(p.windows) for p in run.plans) > 1 or CASES[case].group_size == 1, "sequences share iterations"
    cut = {w.sequence.id for p in run.plans for w in p.windows if w.start > 0}
    assert cut, "some sequences went forward in several windows"


def test_curve_in_float32(tmp_path: Path) -> None:
    run, curve, errors = both_curves(tmp_path, CASES["warmup and cosine"], torch.float32)
    assert run.losses("job") == pytest.approx(curve.losses, abs=1e-4)
    assert max(errors.values()) < 1e-2


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": 0.0},
        {"lr_schedule": "constant"},
        {"warmup_ratio": 0.0},
        {"seed": 1},
        {"shuffle": False},
        {"weight_decay": 0.1},
        {"adam_beta2": 0.99},
        {"batch_size": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_comparison_is_sharp(wrong: dict, tmp_path: Path) -> None:
    """An oracle with one setting changed gives another curve: a field without effect would be noticed."""
    config = dataclasses.replace(BASE, num_epochs=4, lr_schedule="cosine", warmup_ratio=0.2, max_grad_norm=0.5)
    hf = random_hf_model("llama", tmp_path / "model", torch.float64)
    texts = random_texts(random.Random(5), LENGTHS, VOCAB)
    start = random_adapter(hf, tmp_path / "start", LORA, seed=1, spread=0.1)
    right, other = (
        train_oracle(with_adapter(hf, start, trainable=True).to(torch.float64), texts, c).losses
        for c in (config, dataclasses.replace(config, **wrong))
    )
    assert max(abs(a - b) for a, b in zip(right, other, strict=False)) > 1e-3
