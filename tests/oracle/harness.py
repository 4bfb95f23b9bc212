"""Tiny random Hugging Face models, the engine's parts over the same weights, and plans driven by hand.

Here no scheduler decides: tests choose windows, slices and company themselves, legal but otherwise arbitrary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, models

from flexllm.batch import FusedBatch
from flexllm.config import FinetuneConfig, JobSpec, LoraConfig
from flexllm.core import BackwardSlice, InferenceChunk, Request, SamplingParams, Sequence, SlicePart, StepPlan, TokenWindow
from flexllm.finetune.data import TokenizedDataset
from flexllm.finetune.job import TrainingJob
from flexllm.finetune.trainer import Trainer
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.kv_cache import KVCache
from flexllm.model.config import ModelConfig, rope_frequencies
from flexllm.model.decoder import Decoder
from flexllm.model.loader import load_weights
from flexllm.ops import select_kernels
from flexllm.peft.pool import AdapterPool

VOCAB = 131
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama3.1": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
}


def random_hf_model(family: str, folder: Path, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random model of the family, saved into `folder`; every parameter random, norms and biases too. `overrides` are of its config."""
    torch.manual_seed(seed)
    cls, extra = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(cls(**{**SMALL, **extra, **overrides}), attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if "norm" in name else 0.0))  # about 1 / sqrt(hidden size)
    model.save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))  # engines ask for one; these tests speak in token ids
    if dtype == torch.float64:
        _all_in_float64(model, ModelConfig.from_hf(folder))
    return model.eval()


def _all_in_float64(model: torch.nn.Module, config: ModelConfig) -> None:
    """Hugging Face computes norms and rotations in fp32 whatever the model's type; for an exact oracle they must not.

    The rotation frequencies are the engine's own here; tests/model compares those with Hugging Face's.
    """
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float64)

    def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotation(_self: torch.nn.Module, _x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = MethodType(rotation, module)


@dataclass
class Bench:
    """The engine's parts without its scheduler."""

    folder: Path
    dtype: torch.dtype
    reference_ops: bool = False
    num_blocks: int = 64
    quantization: str | None = None
    model: Decoder = field(init=False)
    trainer: Trainer = field(init=False)

    def __post_init__(self) -> None:
        config = ModelConfig.from_hf(self.folder)
        device = torch.device("cpu")
        kernels = select_kernels(device, self.reference_ops)
        weights = load_weights(self.folder, config, self.dtype, device, self.quantization)
        self.model = Decoder(config, weights, kernels, 256)
        self.cache = KVCache(config.num_layers, self.num_blocks, 16, config.num_kv_heads, config.head_dim, self.dtype, device)
        self.pool = AdapterPool(config, 128, self.dtype, device)
        self.blocks = BlockPool(self.num_blocks, 16)
        self.trainer = Trainer(self.model, self.cache, self.pool)

    def add_job(
        self, job_id: str, examples: list[tuple[np.ndarray, np.ndarray]], lora: LoraConfig, level: str, folder: Path
    ) -> TrainingJob:
        """A job over (ids, labels) examples, all in one group; its adapter random in A and in B."""
        ids, labels = (np.concatenate(p).astype(np.int32) for p in zip(*examples, strict=True))
        offsets = np.cumsum([0, *(len(i) for i, _ in examples)]).astype(np.int64)
        path = folder / f"{job_id}.npz"
        TokenizedDataset(ids, labels, offsets).save(path)
        config = FinetuneConfig(batch_size=len(examples), save_level=level)
        spec = JobSpec(job_id, str(path), str(folder / job_id), finetune=config, peft=lora)
        training = TrainingJob.open(spec, self.pool.allocate(lora), self.pool, self.model, "tiny")
        generator = torch.Generator().manual_seed(len(job_id) + lora.r)
        for p in self.pool.parameters(training.slot).values():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
        self.trainer.add(training)
        return training

    def start(self, training: TrainingJob) -> list[Sequence]:
        """The sequences of the job's one group, with pages."""
        job = training.job
        for i, length in enumerate(job.lengths):
            sequence = Sequence(i, job, i, length, blocks=self.blocks.allocate(self.blocks.blocks_for(length)))
            sequence.rewind()
            job.group.append(sequence)
        return job.group

    def request(self, number: int, length: int, rng: random.Random, slot: int = -1) -> Request:
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        request = Request(f"r{number}", prompt, SamplingParams(temperature=0.0), 0.0, adapter_slot=slot)
        request.blocks = self.blocks.allocate(self.blocks.blocks_for(length + 40))
        return request

    @torch.no_grad()
    def execute(self, plan: StepPlan) -> tuple[torch.Tensor | None, FusedBatch | None]:
        """Run a plan; returns the hidden states and the batch, if it had rows."""
        self.trainer.begin(plan)
        hidden = batch = None
        if plan.inference or plan.windows:
            batch = FusedBatch.build(plan, self.cache, self.pool, self.model.rope, self.trainer.states)
            hidden = self.model.forward(batch, self.cache, self.pool)
            self.trainer.finish_forward(hidden, batch)
        self.trainer.run_backward(plan)
        return hidden, batch

    def logits(self, chunks: list[InferenceChunk]) -> torch.Tensor:
        """Logits [rows, V] of one iteration of these chunks, decode rows first."""
        hidden, _ = self.execute(StepPlan(inference=tuple(chunks)))
        assert hidden is not None
        with torch.no_grad():
            return self.model.logits(hidden)


def random_windows(sequences: list[Sequence], rng: random.Random, longest: int) -> tuple[TokenWindow, ...]:
    """Some rows of some sequences that still have to go forward; advances them."""
    windows = []
    for s in sequences:
        if not s.forward_done and rng.random() < 0.7:
            end = min(s.length, s.forward + rng.randint(1, longest))
            windows.append(TokenWindow(s, s.forward, end))
            s.forward = end
    return tuple(windows)


def random_slices(sequences: list[Sequence], rng: random.Random, longest: int) -> tuple[BackwardSlice, ...]:
    """Some legal backward slices, those of sequences at the same layer sometimes merged; advances them."""
    slices = []
    for _ in range(rng.randint(0, 3)):
        ready = [s for s in sequences if s.forward_done and not s.done]
        if not ready:
            break
        first = rng.choice(ready)
        chosen = [s for s in ready if s is first or (s.layer == first.layer and s.job is first.job and rng.random() < 0.5)]
        parts, layer = [], first.layer
        for s in chosen:
            start = max(0, s.row - rng.randint(1, longest))
            parts.append(SlicePart(s, start, s.row))
            s.row = start
            if start == 0:
                s.layer, s.row = layer - 1, s.length
        slices.append(BackwardSlice(layer, tuple(parts)))
    return tuple(slices)


def peft_twin(model: torch.nn.Module, bench: Bench, training: TrainingJob) -> peft.PeftModel:
    """Hugging Face PEFT with the job's adapter on (a copy of) the same base model."""
    lora = training.spec.peft
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), use_rslora=lora.use_rslora, task_type="CAUSAL_LM"
    )
    twin = peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(bench.dtype)
    tensors = bench.pool.export(bench.pool.parameters(training.slot))
    with torch.no_grad():
        for (layer, site), (a, b) in tensors.items():
            module = _site(twin, layer, site)
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)
    return twin


def _site(twin: peft.PeftModel, layer: int, site: str) -> torch.nn.Module:
    block = twin.base_model.model.model.layers[layer]
    return getattr(block.mlp if site in ("gate_proj", "up_proj", "down_proj") else block.self_attn, site)


def oracle_gradients(
    twin: peft.PeftModel, training: TrainingJob, examples: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over all examples, and its gradients under the engine's names (B transposed)."""
    loss = torch.zeros((), dtype=torch.float64)
    for ids, labels in examples:
        logits = twin(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0]
        target = torch.tensor(labels, dtype=torch.long)
        loss = loss + torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum", ignore_index=-100)
    loss.backward()
    grads = {}
    for site in training.spec.peft.target_modules:
        for layer in range(training.job.num_layers):
            module = _site(twin, layer, site)
            grads[f"layers.{layer}.{site}.A"] = module.lora_A["default"].weight.grad
            grads[f"layers.{layer}.{site}.B"] = module.lora_B["default"].weight.grad.t()
    return float(loss.detach()), grads
