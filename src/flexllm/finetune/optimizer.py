"""From gradients to weights: the ledger that collects a job's gradients, and AdamW over fp32 copies of its adapter.

Parameters go by name, `layers.3.q_proj.A`. Each kind of state is one flat tensor with a view per parameter: a step is a few
passes over megabytes, short enough to fit into an iteration between two tokens, instead of a few hundred small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flexllm.config import FinetuneConfig


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients and optimizer state are kept in: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Flat:
    """Zeros for every parameter, in the masters' type, side by side; `views` has one per parameter, in its shape."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        first = next(iter(params.values()))
        size = sum(p.numel() for p in params.values())
        self.flat = torch.zeros(size, dtype=master_dtype(first.dtype), device=first.device)
        parts = self.flat.split([p.numel() for p in params.values()])
        self.views = {n: part.view(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}


class GradientLedger:
    """The gradients of one job's optimizer step, summed over labels as windows and slices deliver them.

    `label_count` is the number of labels those sums are over; dividing by it at the end is what makes the step
    independent of how the tokens were cut (algorithms.md 2.3).
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._sums = _Flat(params)
        self.label_count = 0

    def add(self, name: str, grad: Tensor) -> None:
        """Add a gradient of the summed loss, in any floating dtype."""
        self._sums.views[name].add_(grad)

    def zero(self) -> None:
        self._sums.flat.zero_()
        self.label_count = 0

    @property
    def flat(self) -> Tensor:
        """The sums of all parameters, one after another [total size]."""
        return self._sums.flat

    def mean(self) -> dict[str, Tensor]:
        """Name -> gradient of the mean loss per label; copies."""
        assert self.label_count > 0, "no labels were counted for this step"
        return {n: s / self.label_count for n, s in self._sums.views.items()}

    def grad_norm(self) -> float:
        """Euclidean norm of `mean()`, over all parameters."""
        return torch.linalg.vector_norm(self.flat).item() / max(1, self.label_count)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes


class AdapterOptimizer:
    """AdamW with clipping and a learning rate schedule over fp32 masters of the live (model dtype) parameters.

    `step` writes through to the live tensors in place; they may be views of a pool.
    """

    def __init__(self, params: Mapping[str, Tensor], config: FinetuneConfig, total_steps: int) -> None:
        self._live = dict(params)
        self._masters, self._exp_avg, self._exp_avg_sq = (_Flat(params) for _ in range(3))
        torch._foreach_copy_(list(self._masters.views.values()), [p.detach() for p in self._live.values()])
        self._parameter = torch.nn.Parameter(self._masters.flat)
        self._adamw = torch.optim.AdamW(
            [self._parameter],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._config = config
        self._total_steps = total_steps
        self._set_steps(0)

    def _set_steps(self, steps: int) -> None:
        self.steps = steps  # done so far
        self._adamw.state[self._parameter] = {
            "step": torch.tensor(float(steps), device=self._parameter.device),
            "exp_avg": self._exp_avg.flat,
            "exp_avg_sq": self._exp_avg_sq.flat,
        }

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step after `step` others, as transformers' get_scheduler has it (constant: constant_with_warmup)."""
        warmup = math.ceil(self._config.warmup_ratio * self._total_steps)
        after_warmup = max(1, self._total_steps - warmup)
        peak = self._config.learning_rate
        if step < warmup:
            return peak * (step / warmup)
        match self._config.lr_schedule:
            case "constant":
                return peak
            case "linear":
                return peak * max(0.0, (self._total_steps - step) / after_warmup)
            case "cosine":
                return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / after_warmup))))
        raise AssertionError(self._config.lr_schedule)

    def step(self, ledger: GradientLedger) -> tuple[float, float]:
        """One step with the ledger's mean gradients. Returns (their norm before clipping, learning rate).

        FloatingPointError, before anything changes, when the norm is not finite.
        """
        assert ledger.flat.shape == self._parameter.shape, "gradients for other parameters"
        assert ledger.label_count > 0, "no labels were counted for this step"
        norm = ledger.grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm} at step {self.steps + 1}; a lower learning rate may help")
        limit = self._config.max_grad_norm
        clip = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        lr = self.learning_rate(self.steps)
        self._adamw.param_groups[0]["lr"] = lr
        self._parameter.grad = ledger.flat * (clip / ledger.label_count)
        self._adamw.step()
        self._parameter.grad = None
        self.steps += 1
        self._publish()
        return norm, lr

    def masters(self) -> dict[str, Tensor]:
        """The parameters at full precision; not copies."""
        return dict(self._masters.views)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for kind, store in (("master", self._masters), ("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            yield from ((f"{name}.{kind}", view) for name, view in store.views.items())

    def state_dict(self) -> dict[str, Tensor]:
        """All that continuing bit by bit takes: copies on the CPU, safe to write while training goes on."""
        return {"steps": torch.tensor(self.steps), **{n: t.detach().to("cpu", copy=True) for n, t in self._state()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. ValueError names the first tensor that is missing, unknown or of another shape."""
        ours = {"steps": torch.tensor(0), **dict(self._state())}
        for name in sorted(ours.keys() | state.keys()):
            expected = tuple(ours[name].shape) if name in ours else "none"
            found = tuple(state[name].shape) if name in state else "missing"
            if expected != found:
                raise ValueError(f"optimizer state {name!r}: expected {expected}, got {found}")
        for name, tensor in self._state():
            tensor.copy_(state[name])
        self._set_steps(int(state["steps"].item()))
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(list(self._live.values()), list(self._masters.views.values()))

    @property
    def nbytes(self) -> int:
        """Masters and both moments; the gradients are the ledger's."""
        return 3 * self._parameter.nbytes
