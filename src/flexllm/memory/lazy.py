"""Zeroed tensors whose pages the operating system provides when they are first touched."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros, which on a CPU would touch every page at once: a large cache that is little used costs little."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
