"""Offline use, in one process: `LLM(model).generate(prompts)` and `LLM(model).finetune(data, LoraConfig(...))`.

The same engine as behind the server, driven by a plain loop: nobody else is waiting, so there are no deadlines to keep.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from flexllm.config import SLO, EngineConfig, FinetuneConfig, JobSpec, SchedulerConfig
from flexllm.core import FinishReason, JobEvent, JobStatus, Request, SamplingParams, StepResult, TokenLogprob, TokenOutput
from flexllm.engine import Engine
from flexllm.finetune.data import DataReport, tokenize_file
from flexllm.model.config import ModelConfig
from flexllm.model.tokenizer import IncrementalDetokenizer, Tokenizer
from flexllm.peft.config import LoraConfig, PeftConfig
from flexllm.scheduler.latency import LatencyModel

# Offline nobody waits for a token: iterations may be long, which is where the device is fastest.
OFFLINE_SCHEDULER = SchedulerConfig(slo=SLO(ttft=3600.0, tpot=3600.0), idle_slice=10.0, max_waiting=1 << 20)

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt became. `logprobs` has one entry per token of `token_ids`, if they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop | length
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A finetuned adapter: a folder in PEFT's format, and how it came about. `generate(adapter=...)` takes it as it is."""

    path: Path
    config: PeftConfig
    report: DataReport  # what the data held, and what was left out
    history: tuple[JobEvent, ...] = field(repr=False)  # one `step` event per optimizer step, `validation` events between

    @property
    def losses(self) -> list[float]:
        """Training loss of each optimizer step."""
        return [e.loss for e in self.history if e.kind == "step" and e.loss is not None]


class LLM:
    """A model in this process.

    `model` is a folder, a .gguf file or a Hugging Face id; None is the default model. `quantization` (q8_0, q4_0 or q4_1) is
    the format of the decoder's linears; adapters are served and finetuned on them as they are. `config` replaces every other
    argument. `trace` is a file to which every iteration is written (see `flexllm trace`). Raises ValueError for a model that
    cannot be loaded. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        max_model_len: int | None = None,
        trace: str | Path | None = None,
        config: EngineConfig | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.config = config or EngineConfig(
            model=model,
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
            max_model_len=max_model_len,
            scheduler=OFFLINE_SCHEDULER,
            trace=Path(trace) if trace is not None else None,
        )
        self._engine = Engine(self.config, progress)
        self.tokenizer = Tokenizer(self._engine.model_folder)
        self._ids = count()
        self._adapters: dict[Path, str] = {}  # folder -> the name its present version is registered under

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._engine.shutdown()

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def model_config(self) -> ModelConfig:
        return self._engine.model_config

    @property
    def latency(self) -> LatencyModel:
        """What the scheduler knows of this machine."""
        return self._engine.latency

    # ------------------------------------------------------------------------------------------------------ inference
    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Path | TrainedAdapter | None = None,
    ) -> list[Completion]:
        """Complete each prompt (text, or token ids), in one continuous batch; results in the order of the prompts.

        `sampling` is one for all prompts, or one per prompt. Raises ValueError for a prompt beyond the context or an
        adapter that does not fit the model.
        """
        batch: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        samplings = _one_each(sampling, len(batch))
        name = self._adapter_name(adapter)
        generations = [self._generation(p, s, name) for p, s in zip(batch, samplings, strict=True)]
        for _ in self._run(generations):
            pass
        return [g.completion() for g in generations]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Path | TrainedAdapter | None = None,
    ) -> list[Completion]:
        """The assistant's next turn of one conversation, or of several, by the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_prompt(c) for c in conversations], sampling, adapter=adapter)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that a conversation becomes, up to where the assistant speaks."""
        return self.tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True)

    def stream(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None, *, adapter: str | Path | TrainedAdapter | None = None
    ) -> Iterator[str]:
        """Complete one prompt, piece by piece. Closing the iterator aborts the request."""
        generation = self._generation(prompt, sampling or SamplingParams(), self._adapter_name(adapter))
        yield from self._run([generation])

    def _generation(self, prompt: str | Sequence[int], sampling: SamplingParams, adapter: str | None) -> _Generation:
        ids = self.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else list(prompt)
        request = Request(
            id=f"offline-{next(self._ids)}",
            prompt_ids=ids,
            sampling=sampling,
            arrival=time.monotonic(),
            adapter=adapter,
        )
        return _Generation(request, IncrementalDetokenizer(self.tokenizer, sampling.stop, ids))

    def _run(self, generations: Sequence[_Generation]) -> Iterator[str]:
        """Step the engine until every generation has ended; yields new text as it comes (of all of them, interleaved)."""
        live: dict[str, _Generation] = {}
        try:
            for g in generations:
                self._engine.add_request(g.request)
                live[g.request.id] = g
            while live:
                for output in self._engine.step().outputs:
                    g = live[output.request_id]
                    if text := g.push(output):
                        yield text
                    if g.finish_reason is None:
                        continue
                    if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                        self._engine.abort_request(g.request.id)
                    del live[g.request.id]
        finally:  # an error or a closed iterator: nothing stays behind in the engine
            for request_id in live:
                self._engine.abort_request(request_id)

    def _adapter_name(self, adapter: str | Path | TrainedAdapter | None) -> str | None:
        """Register an adapter's folder, again if its weights changed since the last time."""
        if adapter is None:
            return None
        folder = Path(adapter.path if isinstance(adapter, TrainedAdapter) else adapter).expanduser().resolve()
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(f"adapter {str(folder)!r} has no adapter_model.safetensors")
        name = f"{folder}@{weights.stat().st_mtime_ns}"
        if self._adapters.get(folder) != name:
            self._engine.register_adapter(name, str(folder))
            if old := self._adapters.pop(folder, None):
                self._engine.unregister_adapter(old)
            self._adapters[folder] = name
        return name

    # ------------------------------------------------------------------------------------------------------ finetuning
    def finetune(
        self,
        data: str | Path | Sequence[Mapping[str, Any]],
        peft: PeftConfig | None = None,
        config: FinetuneConfig | None = None,
        *,
        output_dir: str | Path,
        valid: str | Path | Sequence[Mapping[str, Any]] | None = None,
        init_adapter: str | Path | TrainedAdapter | None = None,
        callback: Callable[[JobEvent], None] | None = None,
    ) -> TrainedAdapter:
        """Finetune an adapter (`peft`: settings of any method, by default LoRA's) and write it to `output_dir`
        (PEFT's format); checkpoints stand in folders beneath it.

        `data` and `valid` are JSONL files, or examples: {"messages": [...]}, {"prompt", "completion"} or {"text"}.
        `init_adapter` continues an adapter that exists. `callback` sees every event as it happens: one of kind `step`
        per optimizer step. Raises ValueError for data without a usable example and RuntimeError if the job fails.
        """
        peft, config = peft or LoraConfig(), config or FinetuneConfig()
        output = Path(output_dir).expanduser().resolve()
        output.mkdir(parents=True, exist_ok=True)
        job_id = f"offline-{next(self._ids)}"
        with tempfile.TemporaryDirectory(prefix="flexllm-") as scratch:
            train_path, report = self._tokenize(data, config, Path(scratch), "train")
            valid_path = self._tokenize(valid, config, Path(scratch), "valid")[0] if valid is not None else None
            spec = JobSpec(
                id=job_id,
                train_path=str(train_path),
                output_dir=str(output),
                valid_path=str(valid_path) if valid_path else None,
                finetune=config,
                peft=peft,
                init_adapter=str(init_adapter.path if isinstance(init_adapter, TrainedAdapter) else init_adapter) if init_adapter else None,
            )
            history = self._train(spec, callback)
        _publish_last_checkpoint(history, output)
        return TrainedAdapter(output, peft, report, tuple(history))

    def _tokenize(
        self, data: str | Path | Sequence[Mapping[str, Any]], config: FinetuneConfig, scratch: Path, name: str
    ) -> tuple[Path, DataReport]:
        if isinstance(data, (str, Path)):
            source = Path(data).expanduser()
        else:
            source = scratch / f"{name}.jsonl"
            source.write_text("".join(json.dumps(example) + "\n" for example in data), encoding="utf-8")
        dataset, report = tokenize_file(source, self.tokenizer, min(config.max_seq_length, self.max_model_len), config.truncate)
        path = scratch / f"{name}.npz"
        dataset.save(path)
        return path, report

    def _train(self, spec: JobSpec, callback: Callable[[JobEvent], None] | None) -> list[JobEvent]:
        history: list[JobEvent] = []
        self._engine.add_job(spec)
        try:
            while True:
                if not self._engine.has_work:
                    time.sleep(0.002)  # trained to the end; the last files are being written in the background
                for event in _events_of(self._engine.step(), spec.id):
                    history.append(event)
                    if callback:
                        callback(event)
                    if event.status == JobStatus.SUCCEEDED:
                        return history
                    if event.status is not None and event.status.is_final:
                        raise RuntimeError(f"finetuning {event.status}: {event.message or 'no reason given'}")
        except BaseException:  # a failing callback or Ctrl-C as well: the job must not go on behind the next call
            if not any(e.status is not None and e.status.is_final for e in history):
                self._engine.cancel_job(spec.id)
            raise


@dataclass(slots=True)
class _Generation:
    """A request in flight and its text so far."""

    request: Request
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None

    def push(self, output: TokenOutput) -> str:
        """Take in one output; returns the text that became final. RuntimeError if the request failed."""
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        text = ""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
            if output.logprob is not None:
                self.logprobs.append(output.logprob)
            if output.finish_reason != FinishReason.STOP:  # the token that ends a text is no part of it
                text = self.detokenizer.push(output.token_id)
        if self.detokenizer.stopped:
            self.finish_reason = FinishReason.STOP.value
        elif output.finish_reason is not None:
            text += self.detokenizer.flush()
            self.finish_reason = output.finish_reason.value
        return text

    def completion(self) -> Completion:
        assert self.finish_reason is not None, f"{self.request.id} has not ended"
        return Completion(
            text=self.detokenizer.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt_ids) - self.request.virtual_tokens,
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs,
        )


def _one_each(sampling: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * n
    if len(sampling) != n:
        raise ValueError(f"{n} prompts but {len(sampling)} SamplingParams; give one for all, or one each")
    return list(sampling)


def _events_of(result: StepResult, job_id: str) -> list[JobEvent]:
    return [e for e in result.events if e.job_id == job_id]


def _publish_last_checkpoint(history: Sequence[JobEvent], output: Path) -> None:
    """Copy the last checkpoint's files to the top of the output folder, each by rename so that none is ever half there."""
    paths = [e.path for e in history if e.kind == "checkpoint" and e.path is not None]
    assert paths, "a job that succeeded has written its adapter"
    for source in Path(paths[-1]).iterdir():
        part = output / f".{source.name}.part"
        shutil.copyfile(source, part)
        part.replace(output / source.name)
