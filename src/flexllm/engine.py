"""The engine: one loop that serves requests and finetunes adapters in the same iterations.

In process: `LLM` (llm.py) drives it directly. Behind HTTP: server/engine_process.py drives it in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexllm.batch import FusedBatch
from flexllm.config import EngineConfig, JobSpec, SchedulerConfig
from flexllm.core import (
    Execution,
    FinetuneJob,
    JobEvent,
    JobStatus,
    Request,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenOutput,
    WindowLoss,
    nobody_waits,
)
from flexllm.finetune.job import TrainingJob
from flexllm.finetune.trainer import Trainer
from flexllm.memory.block_pool import BlockPool
from flexllm.memory.budget import ByteBudget, size_caches
from flexllm.memory.kv_cache import KVCache
from flexllm.model.config import ModelConfig
from flexllm.model.decoder import Decoder
from flexllm.model.graphs import GraphedDecoder
from flexllm.model.loader import default_dtype, load_weights, random_weights, resolve_model
from flexllm.model.sampler import Sampler, token_logprobs
from flexllm.ops import select_kernels, synchronize
from flexllm.peft.pool import AdapterPool
from flexllm.peft.registry import AdapterRegistry
from flexllm.profiler import load_costs, measure_costs, save_costs, take_profile
from flexllm.scheduler.latency import LatencyModel, features_of
from flexllm.scheduler.requests import QueueFullError
from flexllm.scheduler.scheduler import HybridTokenScheduler
from flexllm.tracing import IterationTrace

MAX_TRAINING = 64  # adapters in training at once

Progress = Callable[[str, float], None]  # (what is happening, fraction done)


class OverloadedError(RuntimeError):
    """The waiting queue is full; try again later."""


class Engine:
    def __init__(self, config: EngineConfig, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Loads the model and takes (or reads) the latency profile. ValueError: model or settings that do not work."""
        report = progress or (lambda *_: None)
        self.config, self.clock = config, clock
        self.trace = IterationTrace(config.trace) if config.trace else None
        device = _device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        report("loading the model", 0.0)
        folder = resolve_model(config.model, weights=config.load_format != "dummy")
        self.model_folder, self.model_config = folder, ModelConfig.from_hf(folder)
        self.max_model_len = min(self.model_config.max_len, config.max_model_len or self.model_config.max_len)
        dtype = default_dtype(self.model_config, device) if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.load_format == "dummy":
            weights = random_weights(self.model_config, dtype, device, config.quantization)
        else:
            weights = load_weights(folder, self.model_config, dtype, device, config.quantization)
        self.model = Decoder(self.model_config, weights, select_kernels(device, config.reference_ops), self.max_model_len)

        m = self.model_config
        kv_bytes = KVCache.bytes_per_token(m.num_layers, m.num_kv_heads, m.head_dim, dtype)
        num_blocks, finetune_bytes = size_caches(_free_bytes(device), config.cache, kv_bytes, self.max_model_len)
        self.cache = KVCache(m.num_layers, num_blocks, config.cache.block_size, m.num_kv_heads, m.head_dim, dtype, device)
        self.blocks = BlockPool(num_blocks, config.cache.block_size)
        self.finetune_budget = ByteBudget(finetune_bytes)
        self.adapter_pool = AdapterPool(m, config.adapter_ranks, dtype, device, config.max_adapters + MAX_TRAINING)
        self.adapters = AdapterRegistry(m, self.adapter_pool, config.max_adapters, partial(self.model.refresh_adapter, self.adapter_pool))
        self._forward = GraphedDecoder(self.model) if device.type == "cuda" else self.model.forward
        self.sampler = Sampler()
        self.trainer = Trainer(self.model, self.cache, self.adapter_pool)
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._requests: dict[str, Request] = {}
        self.last_step = StepPlan(), StepResult({})
        self.latency = self._latency_profile(report)
        self.scheduler = HybridTokenScheduler(config.scheduler, self.blocks, self.latency, self.finetune_budget)
        report("ready", 1.0)

    # --------------------------------------------------------------------------------------------------------- the loop
    @torch.no_grad()
    def step(self, waited: Callable[[], float] = nobody_waits) -> StepResult:
        """One iteration: some rows of some requests, some rows of some training sequences, one pass.

        `waited` says for how many seconds a newcomer has waited (0: nobody came). The backward stops at once, after its slice. Windows
        stop at the next layer, and go on from there another time, unless they are predicted to end within the newcomer's patience.
        """
        start = self.clock()
        done = self.execute(self.scheduler.schedule(start), waited)
        plan, result = done.plan, StepResult(done.tokens, done.losses, start, self.clock())
        self.last_step = plan, result
        outputs = self._finish_requests(self.scheduler.update(plan, result))
        result = replace(result, outputs=outputs, events=self._finish_jobs())
        if self.trace:
            self.trace.iteration(plan, result, self.scheduler.num_running, self.scheduler.num_waiting)
        return result

    def execute(self, plan: StepPlan, waited: Callable[[], float] = nobody_waits) -> Execution:
        """Carry out a plan, or what of it the newcomers leave time for; the device has done it when this returns."""
        done = self._carry_out(plan, waited)
        synchronize(self.model.device)
        return done

    def _carry_out(self, plan: StepPlan, waited: Callable[[], float]) -> Execution:
        start = self.clock()

        def impatient() -> bool:
            if (seconds := waited()) == 0:
                return False
            forward = self.latency.predict(features_of(plan.cut(plan.windows)))
            return max(seconds, start + forward - self.clock()) > self.config.scheduler.patience

        self.trainer.begin(plan)
        tokens: dict[str, TokenLogprob] = {}
        losses: tuple[WindowLoss, ...] | None = ()
        if plan.inference or plan.windows:
            batch = FusedBatch.build(plan, self.cache, self.adapter_pool, self.model.rope, self.trainer.states)
            hidden = self._forward(batch, self.cache, impatient)
            tokens = self._sample(hidden, batch)
            losses = self.trainer.finish_forward(hidden, batch, impatient)
        if losses is None:
            reached = tuple((w, self.trainer.states[w.sequence].reached) for w in plan.windows)
            return Execution(plan.cut(suspended=reached), tokens)
        done = self.trainer.run_backward(plan, lambda: waited() > 0)
        if done < len(plan.backward):
            return Execution(plan.cut(plan.windows, plan.backward[:done]), tokens, losses)
        self.trainer.step_optimizers(plan.optimizer_steps, self.clock())
        return Execution(plan, tokens, losses)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def reconfigure(self, config: SchedulerConfig) -> None:
        """Go on with other scheduler settings; nothing restarts. ValueError for a change of one that is fixed at the start."""
        self.scheduler.reconfigure(config)
        self.config = replace(self.config, scheduler=config)

    def _sample(self, hidden: Tensor, batch: FusedBatch) -> dict[str, TokenLogprob]:
        self._take_prompt_logprobs(hidden, batch)
        if not batch.sampled:
            return {}
        logits = self.model.logits(hidden[batch.sampled_rows])
        return {r.id: t for r, t in zip(batch.sampled, self.sampler(logits, list(batch.sampled)), strict=True)}

    def _take_prompt_logprobs(self, hidden: Tensor, batch: FusedBatch) -> None:
        for row, chunk in batch.prompt_logprob_chunks:
            request = chunk.request
            virtual = request.virtual_tokens
            start = max(chunk.start, virtual)
            end = min(chunk.end, len(request.prompt_ids) - 1)  # the last prompt row predicts the first output
            if request.output_ids or end <= start:
                continue
            logits = self.model.logits(hidden[row + start - chunk.start : row + end - chunk.start])
            following = request.prompt_ids[start + 1 : end + 1]
            found = self._prompt_logprobs.setdefault(request.id, [None])
            del found[start + 1 - virtual :]  # a preempted prompt is computed again
            found += token_logprobs(logits, following, request.sampling.prompt_logprobs or 0)

    # --------------------------------------------------------------------------------------------------------- requests
    def add_request(self, request: Request) -> None:
        """ValueError: too long, unknown adapter, bad token ids. OverloadedError: the queue is full."""
        prompt, params = request.prompt_ids, request.sampling
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= self.max_model_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens; the context holds {self.max_model_len}, the answer included")
        vocab = self.model_config.vocab_size
        for what, ids in (("prompt token", prompt), ("logit_bias token", params.logit_bias), ("stop token", params.stop_token_ids)):
            bad = next((t for t in ids if not 0 <= t < vocab), None)
            if bad is not None:
                raise ValueError(f"{what} id {bad} is not in the vocabulary of {vocab}")
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        request.eos_ids = frozenset(self.model_config.eos_ids)
        if request.adapter is not None:
            slot = self.adapters.acquire(request.adapter)
            request.adapter_slot = slot.id
            request.virtual_tokens = slot.virtual_tokens
            request.prompt_ids = [-1] * slot.virtual_tokens + prompt
        try:
            if len(request.prompt_ids) >= self.max_model_len:
                extra = request.virtual_tokens
                raise ValueError(f"the prompt has {len(prompt)} tokens, the adapter adds {extra}; the context holds {self.max_model_len}")
            request.max_len = min(self.max_model_len, len(request.prompt_ids) + params.max_tokens)
            self.scheduler.add_request(request)
        except ValueError as error:
            self._release_adapter(request)
            if isinstance(error, QueueFullError):
                raise OverloadedError(str(error)) from error
            raise
        self._requests[request.id] = request

    def abort_request(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown or finished ids are ignored."""
        request = self.scheduler.abort_request(request_id)
        if request is not None:
            self._forget(request_id)
            if self.trace:
                self.trace.aborted(request, self.clock())

    def _finish_requests(self, outputs: tuple[TokenOutput, ...]) -> tuple[TokenOutput, ...]:
        finished = []
        for output in outputs:
            logprobs = self._prompt_logprobs.pop(output.request_id, None)
            finished.append(output._replace(prompt_logprobs=tuple(logprobs)) if logprobs else output)
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return tuple(finished)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        self._release_adapter(request)
        self._prompt_logprobs.pop(request_id, None)
        self.sampler.forget(request_id)

    def _release_adapter(self, request: Request) -> None:
        if request.adapter_slot >= 0:
            self.adapters.release(request.adapter_slot)
            request.adapter_slot = -1

    # --------------------------------------------------------------------------------------------------------- adapters
    def register_adapter(self, name: str, path: str | Path) -> None:
        """Make a PEFT folder available to requests under `name`; ValueError if it does not fit the model."""
        self.adapters.register(name, path)

    def unregister_adapter(self, name: str) -> None:
        """Requests in flight finish with it."""
        self.adapters.unregister(name)

    # -------------------------------------------------------------------------------------------------------------- jobs
    def add_job(self, spec: JobSpec) -> FinetuneJob:
        """Start (or go on with) a finetuning job; ValueError when it cannot run here."""
        if spec.id in self.trainer.jobs:
            raise ValueError(f"job {spec.id!r} is already here")
        slot = self.adapters.allocate_for_training(spec.peft)
        try:
            training = TrainingJob.open(spec, slot, self.adapter_pool, self.model, str(self.config.model or self.model_folder.name))
            self.trainer.add(training)
            self.scheduler.add_job(training.job)
        except Exception:
            self.trainer.jobs.pop(spec.id, None)
            self.adapter_pool.free(slot)
            raise
        return training.job

    def pause_job(self, job_id: str) -> None:
        """The steps done so far are made durable; the step under way starts over on resume."""
        self.scheduler.pause_job(job_id)
        self.trainer.save_resume(self._job(job_id), self.clock(), then=JobStatus.PAUSED)

    def resume_job(self, job_id: str) -> None:
        self._job(job_id)
        self.scheduler.resume_job(job_id)

    def cancel_job(self, job_id: str) -> None:
        self._job(job_id)
        self._remove_job(job_id)

    def _job(self, job_id: str) -> TrainingJob:
        if job_id not in self.trainer.jobs:
            raise ValueError(f"unknown job {job_id!r}")
        return self.trainer.jobs[job_id]

    def _remove_job(self, job_id: str) -> None:
        self.scheduler.remove_job(job_id)
        self.trainer.remove(job_id)

    def _finish_jobs(self) -> tuple[JobEvent, ...]:
        events = self.trainer.take_events()
        for event in events:  # a last step that failed is still a failure: look for those first
            if event.status is JobStatus.FAILED and event.job_id in self.trainer.jobs:
                self._remove_job(event.job_id)
        for training in list(self.trainer.jobs.values()):
            if training.job.status is JobStatus.SUCCEEDED:
                self.trainer.finish(training)
                self._remove_job(training.job.id)
        return events

    # ------------------------------------------------------------------------------------------------------------ state
    def shutdown(self) -> tuple[JobEvent, ...]:
        """Write every running job's durable state; the engine is not used afterwards. Returns what no step has told of its jobs."""
        for training in list(self.trainer.jobs.values()):
            self.trainer.save_resume(training, self.clock())
        self.trainer.writer.drain()
        if self.trace:
            self.trace.close()
        return self.trainer.take_events()

    def stats(self) -> dict[str, Any]:
        """For metrics and live views; cheap."""
        pages = self.blocks.num_blocks
        held = sum(s.bytes for s in self.trainer.states.values())
        page_bytes = self.cache.bytes_per_block
        plan, result = self.last_step
        decode = sum(c.is_decode for c in plan.inference)
        return {
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting,
            "num_preemptions": self.scheduler.num_preemptions,
            "slack": plan.slack,
            "prediction_error": self.latency.error_quantile(0.5),
            "step": {
                "decode": decode,
                "prefill": plan.inference_rows - decode,
                "window": plan.window_rows,
                "backward": plan.backward_rows,
                "seconds": result.seconds,
                "predicted": plan.predicted,
                "layers": self.model_config.num_layers,  # `backward` counts rows once per layer
            },
            "kv_usage": 1 - self.blocks.num_free / pages,
            "adapters": self.adapters.resident,
            "memory": {
                "weights": self.model.weight_bytes,
                "kv_cache": (pages - self.blocks.num_free) * page_bytes,
                "kv_cache_total": pages * page_bytes,
                "activations": held,
                "finetune_budget": self.finetune_budget.total,
                "optimizer": sum(t.optimizer.nbytes + t.ledger.nbytes for t in self.trainer.jobs.values()),
            },
            "save_levels": {s.job.id: s.save_level.name for s in self.trainer.states if s.train},
            "finetune_tokens": {j: dict(t.phase_tokens) for j, t in self.trainer.jobs.items()},
        }

    def _profile_path(self) -> Path:
        dtype = str(self.model.dtype).removeprefix("torch.") + (f"-{self.config.quantization}" if self.config.quantization else "")
        shape = hashlib.sha256(repr(self.model_config).encode()).hexdigest()[:8]  # many folders have the same name
        key = (self.model_folder.name, shape, self.model.device.type, dtype, torch.get_num_threads())
        return self.config.state_dir / "profiles" / ("-".join(map(str, key)).replace("/", "_") + ".json")

    @torch.no_grad()
    def _latency_profile(self, report: Progress) -> LatencyModel:
        """The cached profile of this model on this machine, or one measured now. What the model learns later is not stored: it knows
        the last minute's iterations well and may be far off on others."""
        path = self._profile_path()
        try:
            latency, self.model.costs = LatencyModel.load(path), load_costs(path.with_suffix(".costs.json"))
            return latency
        except (OSError, ValueError):
            latency = LatencyModel.default()
        self.model.costs = measure_costs(self.model)
        latency.fit(take_profile(self, report))
        path.parent.mkdir(parents=True, exist_ok=True)
        latency.save(path)
        save_costs(self.model.costs, path.with_suffix(".costs.json"))
        return latency


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: no CUDA device is available, got 'cuda'")
    return torch.device(name)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
