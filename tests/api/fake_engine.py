"""An engine without a model: it says the same words to everybody, and trains by counting.

What the prompt contains steers it: `REFUSE` and `BUSY` refuse the request, `BREAK` fails it, `CRASH` kills the process,
`SLOW` makes iterations long, `CLASS` and `MODE` are answered with the request's class and the scheduler's mode.
Like the real one it makes a step durable before it tells of it, and tells of the steps again that it goes on from.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer  # flexllm's own brings transformers with it, seconds per process

from flexllm.config import EngineConfig, JobSpec, SchedulerConfig
from flexllm.core import FinishReason, JobEvent, JobStatus, Request, RequestStatus, StepResult, TokenLogprob, TokenOutput, nobody_waits
from flexllm.files import atomic_file
from flexllm.finetune.data import TokenizedDataset
from flexllm.finetune.step_log import LOG_FILE, log_text
from flexllm.model.config import ModelConfig
from flexllm.server.engine_process import ProgressCallback

REPLY = "Hello wörld, this is a reply. "
STEP_SECONDS = 0.002
SLOW_STEP_SECONDS = 0.03
JOB_STEP_SECONDS = 0.02


def build_fake(config: EngineConfig, progress: ProgressCallback, kind: type[FakeEngine] | None = None) -> FakeEngine:
    progress("loading the model", 0.5)
    return (kind or FakeEngine)(config)


@dataclass
class FakeJob:
    spec: JobSpec
    total: int
    step: int = 0
    paused: bool = False
    next_step: float = 0.0
    untold: list[JobEvent] = field(default_factory=list)

    @property
    def resume_file(self) -> Path:
        return Path(self.spec.output_dir) / "resume" / "step"

    def event(self, step: int) -> JobEvent:
        figures = {"loss": 4.0 / step, "token_accuracy": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0}
        return JobEvent(self.spec.id, "step", step, total_steps=self.total, tokens=10 * step, **figures)


@dataclass
class FakeEngine:
    config: EngineConfig
    model_config: Any = field(init=False)
    max_model_len: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.config.model is not None
        self._tokenizer = Tokenizer.from_file(f"{self.config.model}/tokenizer.json")
        self._reply = self._tokenizer.encode(REPLY).ids
        real = ModelConfig.from_hf(Path(self.config.model))
        self.model_config = SimpleNamespace(vocab_size=real.vocab_size, eos_ids=real.eos_ids)
        self.max_model_len = min(self.config.max_model_len or real.max_len, real.max_len)
        self._requests: dict[str, Request] = {}
        self._jobs: dict[str, FakeJob] = {}
        self._adapters: dict[str, str] = {}
        self._aborted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests) or any(not job.paused for job in self._jobs.values())

    # ------------------------------------------------------------------------------------------------------- requests
    def add_request(self, request: Request) -> None:
        text = self._tokenizer.decode(request.prompt_ids)
        if "REFUSE" in text:
            raise ValueError("refused")
        if "BUSY" in text:
            raise RuntimeError("4096 requests are waiting")
        if "CRASH" in text:
            os._exit(9)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ValueError(f"unknown adapter {request.adapter!r}")
        self._requests[request.id] = request

    def abort_request(self, request_id: str) -> None:
        if self._requests.pop(request_id, None) is not None:
            self._aborted += 1

    def register_adapter(self, name: str, path: str) -> None:
        if not (Path(path) / "adapter_config.json").exists():
            raise ValueError(f"{path}: adapter_config.json is missing")
        self._adapters[name] = path

    def unregister_adapter(self, name: str) -> None:
        self._adapters.pop(name, None)

    # ----------------------------------------------------------------------------------------------------------- jobs
    def add_job(self, spec: JobSpec) -> None:
        if spec.peft.r > 256:
            raise ValueError(f"r must be at most 256, got {spec.peft.r}")
        if spec.tenant == "broke":
            raise ValueError("the tenant 'broke' has no money")
        data = TokenizedDataset.load(spec.train_path)
        steps = -(-len(data) // spec.finetune.group_size) * spec.finetune.num_epochs
        job = FakeJob(spec, min(steps, spec.finetune.max_steps or steps))
        if spec.resume and job.resume_file.exists():
            job.step = int(job.resume_file.read_text())
            job.untold += [job.event(step + 1) for step in range(job.step)]
        self._jobs[spec.id] = job

    def pause_job(self, job_id: str) -> None:
        self._job(job_id).paused = True

    def resume_job(self, job_id: str) -> None:
        self._job(job_id).paused = False

    def cancel_job(self, job_id: str) -> None:
        self._job(job_id)
        del self._jobs[job_id]

    def _job(self, job_id: str) -> FakeJob:
        if job_id not in self._jobs:
            raise ValueError(f"unknown job {job_id!r}")
        return self._jobs[job_id]

    def reconfigure(self, config: SchedulerConfig) -> None:
        self.config = replace(self.config, scheduler=config)

    # ------------------------------------------------------------------------------------------------------- iterations
    def step(self, waited: Callable[[], float] = nobody_waits) -> StepResult:  # noqa: ARG002  # its steps are short
        start = time.monotonic()
        if self.has_work:
            slow = any("SLOW" in self._tokenizer.decode(r.prompt_ids) for r in self._requests.values())
            time.sleep(SLOW_STEP_SECONDS if slow else STEP_SECONDS)
        outputs = tuple(self._next_token(request) for request in list(self._requests.values()))
        events = tuple(event for job in list(self._jobs.values()) for event in self._train(job))
        return StepResult({}, start=start, end=time.monotonic(), outputs=outputs, events=events)

    def _next_token(self, request: Request) -> TokenOutput:
        if "BREAK" in self._tokenizer.decode(request.prompt_ids):
            del self._requests[request.id]
            return TokenOutput(request.id, None, finish_reason=FinishReason.ABORT, error="the iteration failed")
        request.status = RequestStatus.RUNNING
        params, done = request.sampling, len(request.output_ids)
        text = self._tokenizer.decode(request.prompt_ids)
        asked = request.priority if "CLASS" in text else self.config.scheduler.mode if "MODE" in text else None
        reply = self._tokenizer.encode(asked).ids if asked else self._reply
        token = reply[done % len(reply)]
        if done == len(reply) and not params.ignore_eos:
            token = self.model_config.eos_ids[0]
        request.output_ids.append(token)
        finish = None
        if token in self.model_config.eos_ids or token in params.stop_token_ids:
            finish = FinishReason.STOP
        elif len(request.output_ids) >= params.max_tokens or request.num_tokens >= self.max_model_len:
            finish = FinishReason.LENGTH
        if finish is not None:
            del self._requests[request.id]
        return TokenOutput(
            request.id,
            token,
            logprob=self._logprob(token, params.logprobs),
            finish_reason=finish,
            prompt_logprobs=None
            if params.prompt_logprobs is None or done
            else (None, *(self._logprob(t, params.prompt_logprobs) for t in request.prompt_ids[1:])),
        )

    @staticmethod
    def _logprob(token: int, n: int | None) -> TokenLogprob | None:
        return None if n is None else TokenLogprob(token, -0.5, tuple((token + i, -0.5 - i) for i in range(n)))

    def _train(self, job: FakeJob) -> list[JobEvent]:
        if job.untold:
            told, job.untold = job.untold, []
            return told
        now = time.monotonic()
        if job.paused or now < job.next_step:
            return []
        job.next_step = now + JOB_STEP_SECONDS
        job.step += 1
        common: dict[str, Any] = {"step": job.step, "total_steps": job.total, "tokens": 10 * job.step}
        job_id = job.spec.id
        events = [job.event(job.step)]
        if job.step == job.total or job.step % (job.spec.finetune.checkpoint_every or 10) == 0:
            path = Path(job.spec.output_dir) / f"checkpoint-{job.step}"
            path.mkdir(parents=True, exist_ok=True)
            (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": job.spec.peft.r}))
            (path / LOG_FILE).write_text(log_text(job.event(step + 1) for step in range(job.step)))
            events.append(JobEvent(job_id, "checkpoint", loss=4.0 / job.step, token_accuracy=0.5, path=str(path), **common))
        if job.spec.valid_path and job.step == job.total:
            events.append(JobEvent(job_id, "validation", loss=1.25, token_accuracy=0.75, **common))
        with atomic_file(job.resume_file) as part:
            part.write_text(str(job.step))
        if job.step == job.total:
            del self._jobs[job_id]
            events.append(JobEvent(job_id, "status", status=JobStatus.SUCCEEDED, **common))
        return events

    def stats(self) -> dict[str, Any]:
        return {
            "num_running": len(self._requests),
            "num_waiting": 0,
            "num_preemptions": self._aborted,
            "kv_usage": 0.0,
            "step": {"decode": len(self._requests), "prefill": 0, "window": len(self._jobs), "backward": 0},
            "memory": {"weights": 1},
            "finetune_tokens": {job_id: {"backward": 10 * job.step} for job_id, job in self._jobs.items()},
        }

    def shutdown(self) -> tuple[JobEvent, ...]:
        return ()
