"""Every operator the model and its bypass networks are made of."""

from __future__ import annotations

import torch

from flexllm.ops.quantized import QuantizedWeight
from flexllm.ops.reference import LinearWeight, ReferenceKernels

__all__ = ["LinearWeight", "QuantizedWeight", "ReferenceKernels", "select_kernels", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given to do (a CPU has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def select_kernels(device: torch.device, reference: bool = False) -> ReferenceKernels:
    """The kernels for a device, chosen once at start."""
    if reference:
        return ReferenceKernels()
    if device.type == "cuda":
        from flexllm.ops.cuda import CudaKernels

        return CudaKernels()
    from flexllm.ops.cpu import CpuKernels

    return CpuKernels()
