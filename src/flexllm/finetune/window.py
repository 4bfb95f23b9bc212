"""The forward half of token-level finetuning: the loss of every window, with its gradient at once."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from flexllm.batch import FusedBatch, WindowRows
from flexllm.core import WindowLoss
from flexllm.model.decoder import Decoder

IGNORED = -100


def finish_forward(model: Decoder, hidden: Tensor, batch: FusedBatch) -> tuple[WindowLoss, ...]:
    """Loss of every window from `hidden` [N, d] (before the final norm); for training sequences also d(loss)/d(hidden), into
    their `grad`. Nothing of the head is kept (algorithms.md 4.4).

    The gradient is that of the *summed* loss; the optimizer step divides by the group's number of labels.
    """
    by_kind: dict[bool, list[WindowRows]] = defaultdict(list)
    for rows in batch.windows:
        by_kind[rows.state.program is not None].append(rows)
    losses = [loss for train, windows in by_kind.items() for loss in _losses(model, hidden, windows, train)]
    return tuple(losses)


def _losses(model: Decoder, hidden: Tensor, windows: list[WindowRows], train: bool) -> list[WindowLoss]:
    out = []
    eps = model.config.rms_eps
    for rows in windows:
        window, state = rows.window, rows.state
        x = hidden[rows.span]
        labels = state.labels[window.start : window.end]
        valid = (labels != IGNORED).nonzero()[:, 0]
        if train and state.grad is None:
            state.grad = torch.zeros(window.sequence.length, x.shape[1], dtype=x.dtype, device=x.device)
        if len(valid) == 0:
            out.append(WindowLoss(window.sequence, 0.0, 0, 0))
            continue
        xv = x if len(valid) == len(labels) else x[valid]
        h = model.kernels.rms_norm(xv, model.final_norm, eps)
        loss, correct, dh = model.kernels.cross_entropy_head(h, model.head, labels[valid], 1.0, backward=train)
        if dh is not None:
            assert state.grad is not None
            state.grad[window.start + valid] = model.kernels.rms_norm_dx(dh, xv, model.final_norm, eps)
        out.append(WindowLoss(window.sequence, loss, len(valid), correct))
    return out
