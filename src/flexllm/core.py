"""The nouns of the engine, shared by every folder. No torch here: the scheduler and the simulator run on these alone.

Life of a request: `Request` (WAITING) -> `InferenceChunk`s in `StepPlan`s -> `TokenOutput`s in `StepResult`s -> FINISHED.
Life of a training token: `FinetuneJob` -> `Sequence` -> `TokenWindow` (forward) -> `BackwardSlice`s (layer by layer, last row
first) -> an entry of `StepPlan.optimizer_steps` -> `JobEvent`.

Times are seconds on the caller's clock. Row ranges are half open, `[start, end)`, in absolute positions of their sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import add
from typing import NamedTuple

INTERACTIVE, BATCH = "interactive", "batch"  # classes of requests


# ---------------------------------------------------------------------------------------------------------- inference
class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token id (stop strings end a request from outside, through abort)
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"


class RequestStatus(StrEnum):
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Raises ValueError, naming the field, on values out of range.

    `stop` (strings) is honoured where text exists: by the output processor in front of the engine, never by the engine.
    """

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None  # how many alternatives to report per token; 0 reports the sampled token alone
    prompt_logprobs: int | None = None  # the same for prompt tokens (completions with `echo`)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, want: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {want}, got {getattr(self, name)!r}")

        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            check(name, math.isfinite(getattr(self, name)), "finite")
        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        check("top_k", self.top_k >= 0, "0 (off) or positive")
        check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2")
        check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2")
        check("repetition_penalty", 0.0 < self.repetition_penalty <= 10.0, "in (0, 10]")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20")
        check("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "between 0 and 20")
        check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        bad = {t: b for t, b in self.logit_bias.items() if t < 0 or not (-100.0 <= b <= 100.0)}
        if bad:
            raise ValueError(f"logit_bias must map token ids to values between -100 and 100, got {bad!r}")


@dataclass(eq=False, slots=True)
class Request:
    """One generation. Invariant: 0 <= num_computed <= num_tokens, and blocks cover at least num_computed positions.

    `num_computed` counts the positions whose K/V is in the cache. A running request whose num_computed is
    num_tokens - 1 is decoding: its next chunk is one row. Preemption drops blocks and sets num_computed to 0;
    the prompt and the outputs so far are then prefilled again.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    arrival: float
    adapter: str | None = None  # name of a loaded adapter; None is the base model
    priority: str = INTERACTIVE  # the SLO class
    eos_ids: frozenset[int] = frozenset()  # the model's; ignored under sampling.ignore_eos
    max_len: int = 0  # filled by the engine: prompt + max_tokens, at most the context
    # filled by the scheduler
    status: RequestStatus = RequestStatus.WAITING
    num_computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    # filled by the engine at admission: pins the adapter version the request started with
    adapter_slot: int = -1
    virtual_tokens: int = 0  # prompt ids (-1) that the adapter put before the others

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_decoding(self) -> bool:
        return bool(self.output_ids) and self.num_computed == self.num_tokens - 1

    def token_at(self, position: int) -> int:
        n = len(self.prompt_ids)
        return self.prompt_ids[position] if position < n else self.output_ids[position - n]


# ---------------------------------------------------------------------------------------------------------- finetuning
class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class SaveLevel:
    """What a training sequence keeps between forward and backward, in bytes and in time (compiler/levels.py)."""

    name: str
    bytes_per_token: int  # saved activations of all layers and the gradients in flight; K/V pages apart
    cost: float = 1.0  # of a backward row, next to one that recomputes nothing
    depth: int = 1  # layers that a backward slice takes its rows through


@dataclass(eq=False, slots=True)
class FinetuneJob:
    """What the scheduler knows of a job: lengths and counts, no tensors and no tokens.

    An optimizer step (one *group*) is `group_size` consecutive examples of the epoch's order; the last group of an
    epoch may be smaller. A group's sequences go forward and backward in any interleaving; then the step; only then does
    the next group start (its forward needs the new weights). A validation pass, when due, runs between two groups.
    """

    id: str
    lengths: SequenceOf[int]  # rows to run per training example, >= 1
    label_counts: SequenceOf[int]  # labels that count in the loss, per training example
    group_size: int = 1  # examples per optimizer step (batch_size * gradient_accumulation_steps)
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    shuffle: bool = True
    weight: float = 1.0  # fair share among the jobs of its tenant
    tenant: str = ""  # tenants share equally
    valid_lengths: SequenceOf[int] = ()
    eval_every: int | None = None  # optimizer steps between validation passes; None: at the end of each epoch
    # filled by the engine when it compiles the job
    num_layers: int = 0
    lowest_layer: int = 0  # backward stops after this layer
    levels: tuple[SaveLevel, ...] = ()  # the fastest first; a sequence is admitted at the first whose bytes are free
    # filled by the scheduler
    status: JobStatus = JobStatus.QUEUED
    step: int = 0  # optimizer steps done
    group: list[Sequence] = field(default_factory=list)  # the training sequences of the step under way, or of a validation pass
    served: float = 0.0  # finetuning seconds received, divided by weight (fair share)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.group_size)

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(eq=False, slots=True)
class Sequence:
    """One training (or validation) example in flight.

    Rows [0, forward) have gone forward. Backward is layer-major: at layers above `layer` every row is done, at `layer`
    rows [row, length) are done. Invariant: 0 <= forward <= length, and backward has not begun (layer == num_layers - 1
    and row == length) unless forward == length. Done when layer < lowest_layer (training) or forward == length
    (validation).
    """

    id: int
    job: FinetuneJob
    example: int  # index into the job's training (or validation) set
    length: int
    train: bool = True
    # filled by the scheduler
    blocks: list[int] = field(default_factory=list)
    level: int = 0  # index into the job's levels, chosen when it is admitted
    forward: int = 0
    under_way: TokenWindow | None = None  # its next rows, if interrupted: they, or the first of them, go on from the layer they reached
    layer: int = 0
    row: int = 0

    @property
    def forward_done(self) -> bool:
        return self.forward == self.length

    @property
    def done(self) -> bool:
        return self.forward_done and (not self.train or self.layer < self.job.lowest_layer)

    @property
    def save_level(self) -> SaveLevel:
        return self.job.levels[self.level]

    def next_window(self, rows: int) -> TokenWindow:
        """Its next rows, from the layer on that they have reached."""
        return TokenWindow(self, self.forward, self.forward + rows, self.under_way.layer if self.under_way else 0)

    def lowest_of_slice(self, layer: int) -> int:
        """The layer in which a backward slice that starts at `layer` ends."""
        job = self.job
        return max(layer - job.levels[self.level].depth + 1, job.lowest_layer)

    @property
    def backward_begun(self) -> bool:
        return self.train and (self.layer < self.job.num_layers - 1 or self.row < self.length)

    def rewind(self) -> None:
        """Back to the start; the caller has released the blocks (and whatever the trainer holds)."""
        self.forward, self.layer, self.row = 0, self.job.num_layers - 1, self.length
        self.under_way = None


# ---------------------------------------------------------------------------------------------------------- one iteration
class InferenceChunk(NamedTuple):
    """Rows [start, end) of a request. `sample`: the last row's logits become a token.

    A named tuple, because one is built per request and iteration: a third of the cost of a frozen dataclass.
    """

    request: Request
    start: int
    end: int
    sample: bool

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def is_decode(self) -> bool:
        return self.end - self.start == 1 and self.sample and self.start > 0

    @property
    def pairs(self) -> int:
        """Visible query-key pairs (algorithms.md 2.5)."""
        return _pairs(self.start, self.end)


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Rows [start, end) of a training sequence, going forward from `layer` on: those below were done when it was interrupted."""

    sequence: Sequence
    start: int
    end: int
    layer: int = 0

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def rows_left(self) -> int:
        """Rows that would cost as much from the first layer on."""
        return self.left(self.rows)

    @property
    def pairs_left(self) -> int:
        """The same of visible query-key pairs."""
        return self.left(_pairs(self.start, self.end))

    def left(self, whole: int) -> int:
        """Of what all layers together cost, what those from `layer` on do."""
        if not self.layer:
            return whole
        layers = self.sequence.job.num_layers
        return -(-whole * (layers - self.layer) // layers)


class SlicePart(NamedTuple):
    sequence: Sequence
    start: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def pairs(self) -> int:
        return _pairs(self.start, self.end)


class BackwardSlice(NamedTuple):
    """Layers `layer` down to `lowest` of the backward pass, for rows of one or more sequences of the same job and save level
    (they share the GEMMs). More than one layer where the level rebuilds several at a time."""

    layer: int
    parts: tuple[SlicePart, ...]

    @property
    def lowest(self) -> int:
        return self.parts[0].sequence.lowest_of_slice(self.layer)

    @property
    def num_layers(self) -> int:
        return self.layer - self.lowest + 1

    @property
    def cost(self) -> float:
        """Rows times layers, in rows that recompute nothing."""
        return self.rows * self.num_layers * self.parts[0].sequence.save_level.cost

    @property
    def job(self) -> FinetuneJob:
        return self.parts[0].sequence.job

    @property
    def rows(self) -> int:
        return sum([p.rows for p in self.parts])

    @property
    def pairs(self) -> int:
        """Query-key pairs times layers."""
        return self.num_layers * sum([p.pairs for p in self.parts])


def _pairs(start: int, end: int) -> int:
    s = end - start
    return s * start + s * (s + 1) // 2


def nobody_waits() -> float:
    """Seconds that a newcomer has waited: none, for nobody came."""
    return 0.0


class PlanFeatures(NamedTuple):
    """What the time of an iteration depends on. Counts over the whole iteration. `+` adds them up, one by one.

    A named tuple, because several are built per iteration: a frozen dataclass takes three times as long.
    """

    rows: int = 0  # forward rows: inference and windows (`rows_left` of them)
    decode_rows: int = 0
    decode_context: int = 0  # keys that decode rows see
    prefill_pairs: int = 0  # query-key pairs of prefill and window rows
    prefills: int = 0  # prompts: each has its own attention, and a GPU that replays decode rows as one graph cannot with them
    sampled_rows: int = 0  # rows whose logits are computed and sampled
    label_rows: int = 0  # window rows that go through the loss
    windows: int = 0  # each reads the head's weights for its loss
    backward_rows: float = 0  # rows x layers, in rows that recompute nothing
    backward_pairs: int = 0  # query-key pairs x layers
    backward_slices: int = 0
    optimizer_steps: int = 0

    def __add__(self, other: PlanFeatures) -> PlanFeatures:  # type: ignore[override]  # not a concatenation
        return PlanFeatures._make(map(add, self, other))

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.backward_slices or self.optimizer_steps)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one iteration does, in the order of the flat token axis: decode rows, prefill rows, window rows.

    The backward slices run after the forward, in the order given; then the optimizer steps.
    """

    inference: tuple[InferenceChunk, ...] = ()  # decode chunks first
    windows: tuple[TokenWindow, ...] = ()
    backward: tuple[BackwardSlice, ...] = ()
    optimizer_steps: tuple[FinetuneJob, ...] = ()
    released: tuple[Sequence, ...] = ()  # sequences whose pages were taken back; the trainer drops what it holds
    restarted: tuple[FinetuneJob, ...] = ()  # groups rewound after backward had begun; the trainer zeroes their gradients
    slack: float = math.inf  # seconds until the earliest deadline at planning time, margin taken off
    predicted: float = 0.0  # seconds, by the latency model
    features: PlanFeatures | None = None  # of all of it, as `features_of` counts them; None where no scheduler made the plan
    interrupted: bool = False  # a request came: this is what was done of a longer plan
    suspended: tuple[tuple[TokenWindow, int], ...] = ()  # its windows that are under way, and the layer that each has reached

    @property
    def is_empty(self) -> bool:
        """Nothing to execute. A plan that only takes memory back is not empty: the trainer has to hear of it."""
        return not (self.inference or self.windows or self.backward or self.optimizer_steps or self.released or self.restarted)

    def cut(
        self,
        windows: tuple[TokenWindow, ...] = (),
        backward: tuple[BackwardSlice, ...] = (),
        suspended: tuple[tuple[TokenWindow, int], ...] = (),
    ) -> StepPlan:
        """What was done of it when a request came: the inference and so much of the finetuning."""
        return replace(self, windows=windows, backward=backward, optimizer_steps=(), features=None, interrupted=True, suspended=suspended)

    @property
    def inference_rows(self) -> int:
        return sum(c.rows for c in self.inference)

    @property
    def window_rows(self) -> int:
        return sum(w.rows for w in self.windows)

    @property
    def backward_rows(self) -> int:
        """Rows times layers."""
        return sum(s.rows * s.num_layers for s in self.backward)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class TokenOutput(NamedTuple):
    """A token sampled for a request, or its end (`token_id` None when it ended without a new one).

    A named tuple for the reason that `InferenceChunk` is one.
    """

    request_id: str
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first token, when asked for; [0] is None
    error: str | None = None
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class WindowLoss:
    sequence: Sequence
    loss_sum: float  # summed over the window's labels
    labels: int
    correct: int  # labels that were the argmax


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something a job's owner wants to know. `kind`: step | validation | checkpoint | status."""

    job_id: str
    kind: str
    step: int
    epoch: float = 0.0
    total_steps: int = 0
    loss: float | None = None
    token_accuracy: float | None = None
    tokens: int = 0  # tokens trained so far
    labels: int = 0  # labels in this step
    grad_norm: float | None = None
    learning_rate: float | None = None
    status: JobStatus | None = None
    path: str | None = None  # a checkpoint's folder
    message: str = ""
    save_level: str = ""  # the deepest at which a sequence of this step was held


@dataclass(frozen=True, slots=True)
class Execution:
    """What carrying out a plan came to."""

    plan: StepPlan  # what of it was done
    tokens: Mapping[str, TokenLogprob] = field(default_factory=dict)  # request id -> what was sampled
    losses: tuple[WindowLoss, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    tokens: Mapping[str, TokenLogprob]  # request id -> what was sampled
    losses: tuple[WindowLoss, ...] = ()
    start: float = 0.0
    end: float = 0.0
    outputs: tuple[TokenOutput, ...] = ()  # filled by scheduler.update
    events: tuple[JobEvent, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.start
