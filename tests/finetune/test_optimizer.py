"""AdamW over masters, against torch and transformers; the gradient ledger; bit-exact continuation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from flexllm.config import FinetuneConfig
from flexllm.finetune.optimizer import AdapterOptimizer, GradientLedger

SHAPES = {"layers.0.q_proj.A": (4, 6), "layers.0.q_proj.B": (4, 5), "layers.1.down_proj.A": (4, 8)}


def params(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def grads(step: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: (scale * torch.randn(s, generator=generator)).to(dtype) for n, s in SHAPES.items()}


def ledger(gradients: dict[str, Tensor]) -> GradientLedger:
    """These gradients, as if they were of one label."""
    filled = GradientLedger(gradients)
    for name, grad in gradients.items():
        filled.add(name, grad)
    filled.label_count = 1
    return filled


def config(**values: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_schedule": "constant", **values})


# ---------------------------------------------------------------------------------------------------------------- ledger
def test_the_ledger_means_over_labels_however_the_sum_was_cut() -> None:
    filled = GradientLedger(params(torch.bfloat16))
    whole = grads(0)
    for name, g in whole.items():
        for part in (0.25, 0.5, 0.25):
            filled.add(name, part * g)
    filled.label_count = 8
    mean = filled.mean()
    for name, g in whole.items():
        assert mean[name].dtype == torch.float32
        torch.testing.assert_close(mean[name], g / 8)
    assert filled.grad_norm() == pytest.approx(math.sqrt(sum(float((m**2).sum()) for m in mean.values())))
    mean["layers.0.q_proj.A"].zero_()  # a copy
    assert filled.grad_norm() > 0
    filled.zero()
    assert filled.label_count == 0
    assert filled.grad_norm() == 0


def test_the_ledger_keeps_float64_and_widens_bfloat16() -> None:
    double = GradientLedger(params(torch.float64))
    double.label_count = 1
    assert {g.dtype for g in double.mean().values()} == {torch.float64}
    half = GradientLedger(params(torch.bfloat16))
    for _ in range(1000):  # in bfloat16 the sum would stick at 256
        half.add("layers.0.q_proj.A", torch.ones(4, 6, dtype=torch.bfloat16))
    half.label_count = 1
    assert half.mean()["layers.0.q_proj.A"][0, 0] == 1000


# ------------------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup_ratio"), [(1, 0.0), (7, 0.0), (100, 0.03), (33, 0.5), (3, 0.9)])
def test_learning_rates_are_those_of_transformers(schedule: str, total: int, warmup_ratio: float) -> None:
    ours = AdapterOptimizer(params(), config(lr_schedule=schedule, warmup_ratio=warmup_ratio), total)
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, theirs, num_warmup_steps=math.ceil(warmup_ratio * total), num_training_steps=total)
    for step in range(total + 2):
        assert ours.learning_rate(step) == scheduler.get_last_lr()[0]
        theirs.step()
        scheduler.step()


# ------------------------------------------------------------------------------------------------------------------ steps
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e6])
def test_steps_are_those_of_torch(max_grad_norm: float) -> None:
    live = params()
    reference = [torch.nn.Parameter(p.clone()) for p in live.values()]
    ours = AdapterOptimizer(live, config(max_grad_norm=max_grad_norm, weight_decay=0.1, adam_beta1=0.8, lr_schedule="linear"), 10)
    adamw = torch.optim.AdamW(reference, lr=1e-2, betas=(0.8, 0.999), eps=1e-8, weight_decay=0.1)
    scheduler = get_scheduler("linear", adamw, 0, 10)
    for step in range(10):
        for p, g in zip(reference, grads(step).values(), strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference, max_grad_norm or math.inf)
        assert ours.step(ledger(grads(step))) == (pytest.approx(float(norm)), scheduler.get_last_lr()[0])
        adamw.step()
        scheduler.step()
    for theirs, mine in zip(reference, live.values(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=2.4e-7, atol=1e-7)  # two fp32 roundings: the fused step rounds once less


def test_small_updates_survive_in_the_masters_of_bfloat16_parameters() -> None:
    live = {"w": torch.ones(3, dtype=torch.bfloat16)}
    optimizer = AdapterOptimizer(live, config(learning_rate=1e-4), 100)
    for _ in range(100):  # each step is far below bfloat16's resolution at 1
        optimizer.step(ledger({"w": torch.ones(3)}))
    assert optimizer.masters()["w"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters()["w"], torch.full((3,), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(live["w"], optimizer.masters()["w"].bfloat16())


def test_float64_stays_float64_and_views_are_written_through() -> None:
    pool = torch.zeros(10, 6, dtype=torch.float64)
    live = {"w": pool[2:6]}
    AdapterOptimizer(live, config(), 10).step(ledger({"w": torch.full((4, 6), 1e-3, dtype=torch.float64)}))
    assert pool[2:6].abs().min() > 0.009
    assert pool[:2].abs().max() == pool[6:].abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    live = params()
    optimizer = AdapterOptimizer(live, config(), 10)
    optimizer.step(ledger(grads(0)))
    before = {n: p.clone() for n, p in live.items()}
    with pytest.raises(FloatingPointError, match="step 2"):
        optimizer.step(ledger(grads(1, scale=bad)))
    assert all(torch.equal(live[n], before[n]) for n in live)
    assert optimizer.steps == 1


# ----------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_continuing_from_saved_state_is_bit_exact(dtype: torch.dtype, at: int) -> None:
    settings = config(lr_schedule="cosine", warmup_ratio=0.2, weight_decay=0.01)
    live = params(dtype)
    optimizer = AdapterOptimizer(live, settings, 10)
    for step in range(at):
        optimizer.step(ledger(grads(step, dtype)))
    state = optimizer.state_dict()
    resumed_live = {n: torch.zeros_like(p) for n, p in live.items()}
    resumed = AdapterOptimizer(resumed_live, settings, 10)
    for step in range(at, 10):  # the state is a copy: going on here does not touch it
        optimizer.step(ledger(grads(step, dtype)))
    resumed.load_state_dict(state)
    for step in range(at, 10):
        resumed.step(ledger(grads(step, dtype)))
    assert all(torch.equal(live[n], resumed_live[n]) for n in live)
    assert all(torch.equal(optimizer.masters()[n], resumed.masters()[n]) for n in live)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_state_that_does_not_fit_is_refused() -> None:
    optimizer = AdapterOptimizer(params(), config(), 10)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"'layers\.0\.q_proj\.A\.master': expected \(4, 6\), got missing"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "layers.0.q_proj.A.master"})
    with pytest.raises(ValueError, match=r"'extra': expected none"):
        optimizer.load_state_dict({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got \(2, 6\)"):
        optimizer.load_state_dict({**state, "layers.0.q_proj.A.exp_avg": torch.zeros(2, 6)})
