"""Triton kernels: what torch's own CUDA operators do in many passes, or not at all."""
