"""Bodies of requests. Whatever is not declared here is refused by name: nothing is accepted and then ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import BATCH, INTERACTIVE, SamplingParams
from flexllm.server.errors import bad_request

MAX_CHOICES = 128
BASE_LEARNING_RATE = 2e-4  # what `learning_rate_multiplier` multiplies

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class Wire(BaseModel):
    # A string with a bound, however large, is checked to be text: JSON can spell half a surrogate pair, no encoding can.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_max_length=1 << 25)


# ------------------------------------------------------------------------------------------------------------- serving
class StreamOptions(Wire):
    include_usage: bool = False


class GenerationRequest(Wire):
    """What chat and plain completions share. None stands for the default, as the clients send it."""

    model: Name
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    user: str | None = None
    metadata: Metadata | None = None

    @property
    def priority(self) -> str:
        """The scheduler's class of the request: `flex` is what can wait."""
        return BATCH if self.service_tier == "flex" else INTERACTIVE

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, vocab_size: int, **fields: Any) -> SamplingParams:
        """`fields` are what the two endpoints spell differently. Raises a 400 that names the field."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        fields |= {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(
                **fields,
                ignore_eos=self.ignore_eos,
                stop=self._stop_strings(),
                stop_token_ids=tuple(self._token_ids("stop_token_ids", self.stop_token_ids or [], vocab_size)),
                logit_bias=self._logit_bias(vocab_size),
            )
        except ValueError as error:
            raise bad_request(str(error), param=str(error).split()[0]) from None

    def _stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 16 or any(not text for text in stop):
            raise bad_request("stop must be at most 16 strings, none of them empty", "stop")
        return tuple(stop)

    def _logit_bias(self, vocab_size: int) -> dict[int, float]:
        bias = self.logit_bias or {}
        try:
            ids = [int(key) for key in bias]
        except ValueError:
            raise bad_request("logit_bias must map token ids to numbers", "logit_bias") from None
        return dict(zip(self._token_ids("logit_bias", ids, vocab_size), bias.values(), strict=True))

    @staticmethod
    def _token_ids(name: str, ids: list[int], vocab_size: int) -> list[int]:
        if bad := [i for i in ids if not 0 <= i < vocab_size]:
            raise bad_request(f"{name}: token id {bad[0]} is not in the vocabulary of {vocab_size} tokens", name)
        return ids


_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; `developer` is what newer clients call `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


class TokenizeRequest(Wire):
    """Either `prompt` or `messages`."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: list[int]


class LoadAdapterRequest(Wire):
    lora_name: Name
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Wire):
    lora_name: Name


# ----------------------------------------------------------------------------------------------------------- scheduler
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class ObjectivesPatch(Wire):
    ttft: Seconds | None = None
    tpot: Seconds | None = None

    def apply(self, slo: SLO) -> SLO:
        return replace(slo, **self.model_dump(exclude_none=True))


class SchedulerPatch(Wire):
    """What may change while the engine runs, under the names of `config.SchedulerConfig`; None stands for unchanged."""

    mode: str | None = None
    slo: ObjectivesPatch | None = None
    class_slos: dict[Literal["interactive", "batch"], ObjectivesPatch] | None = None
    temporal_inference_steps: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    idle_slice: Seconds | None = None
    max_window_rows: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    def apply(self, config: SchedulerConfig) -> SchedulerConfig:
        """Raises a 400 that names the field."""
        changes = self.model_dump(exclude_none=True, exclude={"slo", "class_slos"})
        try:
            changed = replace(config, slo=self.slo.apply(config.slo) if self.slo else config.slo, **changes)
        except ValueError as error:
            raise bad_request(str(error), param=str(error).split()[0]) from None
        by_class: dict[str, SLO] = {name: patch.apply(changed.slo_of(name)) for name, patch in (self.class_slos or {}).items()}
        return replace(changed, class_slos={**changed.class_slos, **by_class})


# ---------------------------------------------------------------------------------------------------------- finetuning
class TrainingOptions(Wire):
    """Names of `config.FinetuneConfig`, whose checks they go through."""

    learning_rate: float | None = None
    lr_schedule: str | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int | None = None
    max_seq_length: int | None = None
    truncate: bool | None = None
    max_steps: int | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    priority: float | None = None

    def training_options(self) -> dict[str, Any]:
        return {name: value for name in TrainingOptions.model_fields if (value := getattr(self, name)) is not None}


class Peft(TrainingOptions):
    """A method's settings under PEFT's names (peft/config.py checks them, and refuses what the method does not have)."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None

    def peft_options(self) -> dict[str, Any]:
        given = {"type": self.type, **(self.model_extra or {})}
        return {name: value for name, value in sorted(given.items()) if value is not None}


class Hyperparameters(TrainingOptions):
    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] | None = None
    learning_rate_multiplier: float | Literal["auto"] | None = None
    peft: Peft | None = None


class SupervisedMethod(Wire):
    hyperparameters: Hyperparameters | None = None


class Method(Wire):
    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None


class JobRequest(TrainingOptions):
    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # where it stood before `method`
    peft: Peft | None = None
    integrations: None = None
