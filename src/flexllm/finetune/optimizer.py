"""From gradients to weights: the ledger that collects a job's gradients, and AdamW over fp32 copies of its adapter.

Parameters go by name, `layers.3.q_proj.A`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flexllm.config import FinetuneConfig


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients and optimizer state are kept in: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class GradientLedger:
    """The gradients of one job's optimizer step, summed over labels as windows and slices deliver them.

    `label_count` is the number of labels those sums are over; dividing by it at the end is what makes the step
    independent of how the tokens were cut (algorithms.md 2.3).
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._sums = {n: torch.zeros(p.shape, dtype=master_dtype(p.dtype), device=p.device) for n, p in params.items()}
        self.label_count = 0

    def add(self, name: str, grad: Tensor) -> None:
        """Add a gradient of the summed loss, in any floating dtype."""
        self._sums[name].add_(grad)

    def zero(self) -> None:
        torch._foreach_zero_(list(self._sums.values()))
        self.label_count = 0

    def mean(self) -> dict[str, Tensor]:
        """Name -> gradient of the mean loss per label; new tensors."""
        assert self.label_count > 0, "no labels were counted for this step"
        return dict(zip(self._sums, torch._foreach_div(list(self._sums.values()), self.label_count), strict=True))

    def grad_norm(self) -> float:
        """Euclidean norm of `mean()`, over all parameters."""
        return _norm(list(self._sums.values())).item() / max(1, self.label_count)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._sums.values())


class AdapterOptimizer:
    """AdamW with clipping and a learning rate schedule over fp32 masters of the live (model dtype) parameters.

    `step` writes through to the live tensors in place; they may be views of a pool.
    """

    def __init__(self, params: Mapping[str, Tensor], config: FinetuneConfig, total_steps: int) -> None:
        self._live = dict(params)
        self._masters = {n: torch.nn.Parameter(p.detach().to(master_dtype(p.dtype), copy=True).contiguous()) for n, p in params.items()}
        self._adamw = torch.optim.AdamW(
            list(self._masters.values()),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over each master and its moments
        )
        self._config = config
        self._total_steps = total_steps
        self.steps = 0  # done so far

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

    def step(self, grads: Mapping[str, Tensor]) -> tuple[float, float]:
        """One step with the gradients of the mean loss, which clipping may scale in place. Returns (norm before clipping, lr).

        FloatingPointError, before anything changes, when the norm is not finite.
        """
        assert grads.keys() == self._masters.keys(), "gradients for other parameters"
        norm = _norm(list(grads.values())).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm} at step {self.steps + 1}; a lower learning rate may help")
        if self._config.max_grad_norm:  # as torch.nn.utils.clip_grad_norm_
            shrink = min(1.0, self._config.max_grad_norm / (norm + 1e-6))
            torch._foreach_mul_(list(grads.values()), shrink)
        lr = self.learning_rate(self.steps)
        self._adamw.param_groups[0]["lr"] = lr
        for name, master in self._masters.items():
            master.grad = grads[name].to(master.dtype)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.steps += 1
        self._publish()
        return norm, lr

    def masters(self) -> dict[str, Tensor]:
        """The parameters at full precision; not copies."""
        return {n: m.detach() for n, m in self._masters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All that continuing bit by bit takes: copies on the CPU, safe to write while training goes on."""
        state = {"steps": torch.tensor(self.steps)}
        for name, master in self._masters.items():
            state[f"{name}.master"] = master
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = self._adamw.state[master].get(key, torch.zeros_like(master))
        return {k: v.detach().to("cpu", copy=True) for k, v in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. ValueError names the first tensor that is missing, unknown or of another shape."""
        expected = {"steps": torch.Size()} | {
            f"{n}.{k}": m.shape for n, m in self._masters.items() for k in ("master", "exp_avg", "exp_avg_sq")
        }
        for name in sorted(expected.keys() | state.keys()):
            found = tuple(state[name].shape) if name in state else "missing"
            if name not in expected or found != tuple(expected[name]):
                raise ValueError(f"optimizer state {name!r}: expected {tuple(expected[name]) if name in expected else 'none'}, got {found}")
        self.steps = int(state["steps"].item())
        for name, master in self._masters.items():
            master.copy_(state[f"{name}.master"])
            moments = {k: state[f"{name}.{k}"].to(master, copy=True) for k in ("exp_avg", "exp_avg_sq")}
            self._adamw.state[master] = {"step": torch.tensor(float(self.steps)), **moments}
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(list(self._live.values()), list(self._masters.values()))

    @property
    def nbytes(self) -> int:
        """Masters and both moments; the gradients are the ledger's."""
        return 3 * sum(m.nbytes for m in self._masters.values())


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)
