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
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from flexllm.batch import FusedBatch
from flexllm.config import FinetuneConfig, JobSpec
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
from flexllm.peft.base import module_name
from flexllm.peft.config import BottleneckConfig, LoraConfig, PeftConfig
from flexllm.peft.io import WEIGHTS_FILE, AdapterFile, save_adapter
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
        self, job_id: str, examples: list[tuple[np.ndarray, np.ndarray]], adapter: PeftConfig, level: str, folder: Path
    ) -> TrainingJob:
        """A job over (ids, labels) examples, all in one group; everything that its adapter trains is random."""
        ids, labels = (np.concatenate(p).astype(np.int32) for p in zip(*examples, strict=True))
        offsets = np.cumsum([0, *(len(i) for i, _ in examples)]).astype(np.int64)
        path = folder / f"{job_id}.npz"
        TokenizedDataset(ids, labels, offsets).save(path)
        config = FinetuneConfig(batch_size=len(examples), save_level=level)
        spec = JobSpec(job_id, str(path), str(folder / job_id), finetune=config, peft=adapter)
        training = TrainingJob.open(spec, self.pool.allocate(adapter), self.pool, self.model, "tiny")
        generator = torch.Generator().manual_seed(len(job_id))
        for name, p in self.pool.parameters(training.slot).items():
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
            p.copy_(drawn + 1 if name.endswith((".l", ".magnitude")) else drawn)
        self._zero_beyond_ranks(training)
        self.model.refresh_adapter(self.pool, training.slot)
        self.trainer.add(training)
        return training

    def _zero_beyond_ranks(self, training: TrainingJob) -> None:
        """Where a rank pattern says less than the slot's rows, the rest are zero."""
        if not isinstance(training.spec.peft, LoraConfig):
            return
        for name, p in self.pool.parameters(training.slot).items():
            _, layer, site, parameter = name.split(".")
            if parameter in ("A", "B"):
                p[training.spec.peft.rank_at(module_name(int(layer), site)) :] = 0

    def start(self, training: TrainingJob, level: int = 0) -> list[Sequence]:
        """The sequences of the job's one group, with pages."""
        job = training.job
        for i, length in enumerate(job.lengths):
            sequence = Sequence(i, job, i, length, blocks=self.blocks.allocate(self.blocks.blocks_for(length)), level=level)
            sequence.rewind()
            job.group.append(sequence)
        return job.group

    def request(self, number: int, length: int, rng: random.Random, slot: int = -1) -> Request:
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        request = Request(f"r{number}", prompt, SamplingParams(temperature=0.0), 0.0, adapter_slot=slot)
        request.blocks = self.blocks.allocate(self.blocks.blocks_for(length + 40))
        return request

    @staticmethod
    def prefill(requests: list[Request], rng: random.Random) -> tuple[InferenceChunk, ...]:
        """A few more rows of some requests' prompts."""
        chunks = []
        for r in requests:
            end = min(len(r.prompt_ids) - 1, r.num_computed + rng.randint(1, 6))
            if r.num_computed < end and rng.random() < 0.6:
                chunks.append(InferenceChunk(r, r.num_computed, end, False))
                r.num_computed = end
        return tuple(chunks)

    @torch.no_grad()
    def execute(self, plan: StepPlan) -> tuple[torch.Tensor | None, FusedBatch | None]:
        """Run a plan; returns the hidden states and the batch, if it had rows."""
        self.trainer.begin(plan)
        hidden = batch = None
        if plan.inference or plan.windows:
            batch = FusedBatch.build(plan, self.cache, self.pool, self.model.rope, self.trainer.states)
            hidden = self.model.forward(batch, self.cache)
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
        chosen = [
            s for s in ready if s is first or ((s.layer, s.job, s.level) == (first.layer, first.job, first.level) and rng.random() < 0.5)
        ]
        parts, layer = [], first.layer
        for s in chosen:
            start = max(0, s.row - rng.randint(1, longest))
            parts.append(SlicePart(s, start, s.row))
            s.row = start
            if start == 0:
                s.layer, s.row = s.lowest_of_slice(layer) - 1, s.length
        slices.append(BackwardSlice(layer, tuple(parts)))
    return tuple(slices)


def adapter_file(bench: Bench, training: TrainingJob) -> AdapterFile:
    """The job's adapter as it is served, in the model's type."""
    tensors = bench.pool.parameters(training.slot) | bench.pool.parameters(training.slot, trainable=False)
    return AdapterFile(training.spec.peft, "tiny", tensors)


def peft_twin(model: torch.nn.Module, bench: Bench, training: TrainingJob) -> torch.nn.Module:
    """Hugging Face PEFT with the job's adapter on (a copy of) the same base model, by way of PEFT's files."""
    if isinstance(training.spec.peft, BottleneckConfig):
        return BottleneckTwin(model, training.spec.peft, bench.pool.parameters(training.slot))
    folder = bench.folder.parent / f"twin-{training.job.id}"
    save_adapter(folder, adapter_file(bench, training), bench.model.config)
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    twin = peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(bench.dtype)
    for p in twin.parameters():
        p.data = p.data.to(bench.dtype)
    missing = peft.set_peft_model_state_dict(twin, load_file(folder / WEIGHTS_FILE))
    assert set(missing.unexpected_keys) <= {"prompt_embeddings"}, missing.unexpected_keys  # PEFT reads that one apart
    return twin


class BottleneckTwin(torch.nn.Module):
    """PEFT has no bottleneck adapters; these are hooks on the Hugging Face model, differentiated by autograd."""

    def __init__(self, model: torch.nn.Module, config: BottleneckConfig, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.values = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        act = torch.relu if config.non_linearity == "relu" else torch.nn.functional.silu
        for i, layer in enumerate(model.model.layers):
            pairs = {"attention": (layer.self_attn, layer.input_layernorm), "mlp": (layer.mlp, layer.post_attention_layernorm)}
            for site in config.target_modules:
                module, norm = pairs[site]
                before: dict[str, torch.Tensor] = {}
                norm.register_forward_pre_hook(lambda _m, args, before=before: before.update(x=args[0]))

                def after(_m, _args, out, before=before, key=f"layers.{i}.{site}"):
                    p = {n: self.values[f"{key}.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
                    y = out[0] if isinstance(out, tuple) else out
                    z = before["x"] if config.is_parallel else y
                    y = y + config.scaling * act(z @ p["down"].t() + p["down_bias"][:, 0]) @ p["up"] + p["up_bias"][0]
                    return (y, *out[1:]) if isinstance(out, tuple) else y

                module.register_forward_hook(after)

    def forward(self, **inputs):
        return self.model(**inputs)


def oracle_gradients(
    twin: torch.nn.Module, training: TrainingJob, examples: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over all examples, and its gradients under the engine's names and in its shapes."""
    loss = torch.zeros((), dtype=torch.float64)
    for ids, labels in examples:
        logits = twin(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0][-len(ids) :]
        target = torch.tensor(labels, dtype=torch.long)
        loss = loss + torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum", ignore_index=-100)
    loss.backward()
    return float(loss.detach()), _gradients_by_our_names(twin, training)


def _gradients_by_our_names(twin: torch.nn.Module, training: TrainingJob) -> dict[str, torch.Tensor]:
    if isinstance(twin, BottleneckTwin):
        return {n: p.grad for n, p in twin.values.items()}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}
    buffers = {n: b for n, b in twin.state_dict().items() if ".vera_A." in n or ".vera_B." in n}
    if training.slot.virtual_tokens:
        (found,) = (g for n, g in grads.items() if "prompt_encoder" in n)
        files = {"prompt_embeddings": found}
    else:
        files = peft.get_peft_model_state_dict(twin, state_dict=grads | buffers)
    method, config = training.slot.method, training.spec.peft
    settings, _ = method.write(config, training.pool.parameters(training.slot) | _buffers(training), training.model.config)
    _, ours = method.read(settings, files)
    return {n: g for n, g in ours.items() if n in training.pool.parameters(training.slot)}


def _buffers(training: TrainingJob) -> dict[str, torch.Tensor]:
    return training.pool.parameters(training.slot, trainable=False)
