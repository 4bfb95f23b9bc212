"""CPU kernels: what gains on a CPU over reference.py, each tested equal to it.

oneDNN with prepacked weights for the GEMMs; native/, compiled on the machine, for what torch does in many passes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from flexllm.ops.native import attention, low_rank, quantized, rowwise
from flexllm.ops.native.runtime import IN_MEMORY
from flexllm.ops.quantized import QuantizedWeight
from flexllm.ops.reference import LinearWeight, ReferenceKernels, compute_dtype

LOGITS = 3 * 2**21  # at a time, in the model's type: 128 rows of a vocabulary of 49152; twice as many gain 4 % of the head
EXPAND_ROWS = 6  # up to here, expanding a quantized weight while it is used is faster than doing so first for a GEMM
FEW_ROWS = 64  # of bf16: up to here, what a call of oneDNN costs is more than a low-rank product itself. (fp32 goes to MKL.)
SOFTMAX = 2**19  # of them at a time in fp32: these stay in cache
CODE_CACHE = 4096  # entries in oneDNN's cache, two to a GEMM of so many rows, together some 0.8 MB


@dataclass(eq=False)
class PackedWeight:
    """A weight in oneDNN's blocked layout: for x W^T, and, once a gradient has asked for it, for dy W."""

    forward: Tensor
    backward: Tensor | None = None


class CpuKernels(ReferenceKernels):
    """`pack_backward`: the first gradient through a weight packs its transpose too. That costs the weight's bytes once more;
    dy W gains 10 % at 512 rows, a third to a half below 32 rows and in the head."""

    name = "cpu"

    def __init__(self, pack_backward: bool = True) -> None:
        self.pack_backward = pack_backward
        _keep_freed_memory()
        _keep_generated_code()

    # ------------------------------------------------------------------------------------------------------- linear
    def pack_linear(self, weight: Tensor | QuantizedWeight) -> LinearWeight:
        if isinstance(weight, QuantizedWeight) or not _packable(weight.dtype):
            return LinearWeight(weight)
        return LinearWeight(weight, PackedWeight(_pack(weight)))

    def dense(self, w: LinearWeight) -> Tensor:
        if isinstance(w.weight, QuantizedWeight) and _native(w.weight):
            return quantized.dequantize(w.weight)
        return super().dense(w)

    def linear(self, x: Tensor, w: LinearWeight, bias: Tensor | None = None) -> Tensor:
        if isinstance(w.weight, QuantizedWeight) and _native(x) and x.shape[0] <= EXPAND_ROWS:
            return quantized.linear(x, w.weight, bias)
        if w.packed is None:
            return super().linear(x, w, bias)
        return _packed_linear(x, w.packed.forward, bias)

    def linear_dx(self, dy: Tensor, w: LinearWeight) -> Tensor:
        if w.packed is None or not self.pack_backward:
            return super().linear_dx(dy, w)
        if w.packed.backward is None:
            w.packed.backward = _pack(w.dense().t().contiguous())
        return _packed_linear(dy, w.packed.backward, None)

    def matmul_nt(self, x: Tensor, w: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.shape[0] > FEW_ROWS:
            return linear(x, w)
        return low_rank.matmul_nt(x, w)

    def add_matmul_nn_(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if y.dtype != torch.bfloat16 or y.shape[0] > FEW_ROWS:
            return super().add_matmul_nn_(y, x, w)
        return low_rank.add_matmul_nn_(y, x, w)

    # ------------------------------------------------------------------------------- one pass over memory each
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _native(x):
            return super().rms_norm(x, weight, eps)
        return rowwise.rms_norm(x, weight, eps)

    def rms_norm_dx(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _native(x):
            return super().rms_norm_dx(dy, x, weight, eps)
        return rowwise.rms_norm_dx(dy, x, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not _native(x):
            return super().rope(x, cos, sin)
        return rowwise.rope(x, cos, sin, back=False)

    def rope_transpose(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not _native(dy):
            return super().rope_transpose(dy, cos, sin)
        return rowwise.rope(dy, cos, sin, back=True)

    def swiglu(self, g: Tensor, u: Tensor) -> Tensor:
        if not _native(g):
            return silu(g).mul_(u)
        return rowwise.swiglu(g, u)

    def swiglu_backward(self, dm: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if not _native(g):
            return super().swiglu_backward(dm, g, u)
        return rowwise.swiglu_backward(dm, g, u)

    # ---------------------------------------------------------------------------------------------------- attention
    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
        if not _native(q):
            return super().decode_attention(q, k_cache, v_cache, slots, lengths, scale)
        return attention.decode_attention(q, k_cache, v_cache, slots, lengths, scale)

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if q.dtype == torch.float64:
            return super().window_attention(q, k, v, scale)
        return attention.window_attention(q, k, v, scale)

    def window_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if q.dtype == torch.float64:
            return super().window_attention_backward(do, q, k, v, o, lse, scale)
        return attention.window_attention_backward(do, q, k, v, lse, scale)

    # ------------------------------------------------------------------- what these hold while they run (compiler/workspace.py)
    def attention_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:
        return 4 * (2 * s * heads * hd + 3 * b * kv_heads * hd) + 4 * b * kv_heads * hd

    def attention_backward_bytes(self, s: int, b: int, heads: int, kv_heads: int, hd: int) -> int:
        """Queries, dO and dQ in fp32; K twice, V, and dK and dV of each thread; the gathered K and V."""
        return 4 * (3 * s * heads * hd + (5 + 2 * torch.get_num_threads()) * b * kv_heads * hd) + 4 * b * kv_heads * hd

    def head_bytes(self, rows: int, vocab: int, hidden: int, itemsize: int) -> int:
        chunk = min(rows, max(1, LOGITS // vocab))
        return chunk * vocab * itemsize + 2 * min(chunk * vocab, SOFTMAX) * 4 + (rows + 2 * chunk) * hidden * itemsize

    # --------------------------------------------------------------------------------------------------------- loss
    def cross_entropy_head(
        self, h: Tensor, head: LinearWeight, labels: Tensor, grad_scale: float, backward: bool = True
    ) -> tuple[float, int, Tensor | None]:
        loss, correct = 0.0, 0
        dh = torch.empty_like(h) if backward else None
        rows = max(1, LOGITS // head.shape[0])
        for i in range(0, h.shape[0], rows):
            chunk = slice(i, i + rows)
            z = self.linear(h[chunk], head)
            chunk_loss, chunk_correct = _softmax_minus_label_(z, labels[chunk, None])
            loss += chunk_loss
            correct += chunk_correct
            if dh is not None:
                torch.mul(self.linear_dx(z, head), grad_scale, out=dh[chunk])
            del z  # before the next chunk's: one of them at a time
        return loss, correct, dh


def _keep_freed_memory() -> None:
    """Let glibc keep what this process frees: it returns blocks of megabytes to the system, and each new page of the next one costs
    more than the arithmetic on it (a chunk of logits: 5 % of the loss head)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**25)  # the most it accepts
        mallopt(m_trim_threshold, 2**30)


def _keep_generated_code() -> None:
    """Let oneDNN keep more than 1024 pieces of the code that it generates, for each GEMM and each number of rows.

    Iterations have any number of rows, a training sequence needs 19 GEMMs of its length, each 1 to 2 ms to prepare: at 1024 what was
    needed again had gone, which cost a server that co-serves a fifth of its finetuning (docs/log.md). Read at oneDNN's first GEMM.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CODE_CACHE))


def _native(x: Tensor | QuantizedWeight) -> bool:
    return x.dtype in IN_MEMORY


def _packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _softmax_minus_label_(z: Tensor, labels: Tensor) -> tuple[float, int]:
    """Logits z [n, V] become softmax(z) - onehot(labels [n, 1]), the gradient of the summed loss.

    Returns the loss and how many labels have the largest logit.
    """
    loss, correct = 0.0, 0
    rows = max(1, SOFTMAX // z.shape[1])
    for block, y in zip(z.split(rows), labels.split(rows), strict=True):
        p = block.to(compute_dtype(z.dtype))
        top, label = p.amax(-1, keepdim=True), p.gather(1, y)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)  # torch.softmax adds up in one chain per lane: 1e-5 off at 150,000 logits
        p.div_(total)
        p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
        block.copy_(p)
        loss += float((total.log_() + (top - label)).sum())
        correct += int((label == top).sum())
    return loss, correct
