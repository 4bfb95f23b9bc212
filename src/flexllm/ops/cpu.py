"""CPU kernels: what gains on a CPU over reference.py, each tested equal to it."""

from __future__ import annotations

from flexllm.ops.reference import ReferenceKernels


class CpuKernels(ReferenceKernels):
    name = "cpu"
