"""The forward half of token-level finetuning: the loss of every window, with its gradient at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexllm.batch import FusedBatch, WindowRows
from flexllm.core import WindowLoss
from flexllm.model.decoder import Decoder

IGNORED = -100


def finish_forward(model: Decoder, hidden: Tensor, batch: FusedBatch, interrupted: Callable[[], bool]) -> tuple[WindowLoss, ...] | None:
    """Loss of every window from `hidden` [N, d] (before the final norm); for training sequences also d(loss)/d(hidden), into
    their `grad`. Nothing of the head is kept (algorithms.md 4.4).

    The gradient is that of the *summed* loss; the optimizer step divides by the group's number of labels. None if the forward, or
    this, was `interrupted` before all of it was done: the windows are suspended.
    """
    if len(hidden) < batch.num_rows:
        return None
    losses = [_loss(model, hidden[rows.span], rows, interrupted) for rows in batch.windows]
    if None in losses:
        for rows in batch.windows:
            rows.state.suspend(model.config.num_layers, hidden[rows.span])
        return None
    return tuple(loss for loss in losses if loss is not None)


def _loss(model: Decoder, x: Tensor, rows: WindowRows, interrupted: Callable[[], bool]) -> WindowLoss | None:
    """Of the window rows x [n, d], some at a time; None when interrupted."""
    window, state, eps = rows.window, rows.state, model.config.rms_eps
    train = state.program is not None
    labels = state.labels[window.start : window.end]
    if train and state.grad is None:
        state.grad = torch.zeros(window.sequence.length, x.shape[1], dtype=x.dtype, device=x.device)
    total, correct = 0.0, 0
    valid = (labels != IGNORED).nonzero()[:, 0]
    for part in valid.split(model.kernels.head_rows):
        if interrupted():
            return None
        xv = x[part]
        h = model.kernels.rms_norm(xv, model.final_norm, eps)
        loss, hits, dh = model.kernels.cross_entropy_head(h, model.head, labels[part], 1.0, backward=train)
        total, correct = total + loss, correct + hits
        if dh is not None:
            assert state.grad is not None
            state.grad[window.start + part] = model.kernels.rms_norm_dx(dh, xv, model.final_norm, eps)
    return WindowLoss(window.sequence, total, len(valid), correct)
