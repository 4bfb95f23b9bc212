"""Hugging Face + PEFT training, one optimizer step per line on stdin: the baseline of benchmarks/finetune.py.

LoRA on seven targets, SDPA attention, AdamW, batch 1. A line `{"ids": [...], "checkpointing": bool, "count": bool}` holds
T + 1 token ids: T rows go forward and each has a label. `threads` may be there too: so many from now on. The answer
is `{"seconds", "loss"}`, and `saved_bytes` when `count`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class SavedBytes:
    """Bytes of the storages that autograd keeps for the backward, each once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._storages.values())


class Trainer:
    def __init__(self, folder: str, dtype: torch.dtype, rank: int, alpha: float, adapter_fp32: bool, seed: int) -> None:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        base.config.use_cache = False
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config, autocast_adapter_dtype=adapter_fp32)
        self.model.enable_input_require_grads()  # checkpointing needs an input that requires gradients
        self.model.train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, foreach=True)

    def step(self, ids: list[int], checkpointing: bool, count: bool, threads: int | None = None) -> dict[str, Any]:
        if threads is not None:
            torch.set_num_threads(threads)
        toggle = self.model.gradient_checkpointing_enable if checkpointing else self.model.gradient_checkpointing_disable
        toggle(**({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}))
        tokens = torch.tensor([ids])
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
        saved = SavedBytes(self.model)
        start = time.perf_counter()
        if count:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                loss = self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss
        else:
            loss = self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss.item()}
        return {**answer, "saved_bytes": saved.total} if count else answer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a Hugging Face folder")
    options.add_argument("--dtype", required=True, choices=("bfloat16", "float32"))
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--alpha", type=float, default=32)
    options.add_argument(
        "--adapter-fp32", action="store_true", help="PEFT's default: fp32 adapters under a bf16 model (slower, and more bytes saved)"
    )
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.model, getattr(torch, args.dtype), args.rank, args.alpha, args.adapter_fp32, args.seed)
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.step(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
