"""Every setting, as frozen dataclasses. Unknown keys and absurd values are ValueErrors; environment variables are read
here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from flexllm.checks import require
from flexllm.peft.config import LoraConfig, PeftConfig

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("q8_0", "q4_0", "q4_1")
PATIENCE = 0.1  # of the tightest TTFT objective
RESERVE, SHORT_TTFT = 2.0, 5.0  # in TPOT objectives, see SchedulerConfig.reserve
MODES = ("coserve", "temporal", "inference", "finetune")
LR_SCHEDULES = ("constant", "linear", "cosine")

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from a mapping; ValueError names an unknown key and lists the known ones."""
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown {cls.__name__} key {unknown[0]!r}; known keys: {', '.join(known)}")
    return cls(**values)


def cache_dir() -> Path:
    """Converted models and compiled kernels (they can be made again)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexllm"
    return Path(os.environ.get("FLEXLLM_CACHE_DIR") or default)


def state_dir() -> Path:
    """Database, files, adapters, checkpoints, latency profiles (they cannot)."""
    default = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "flexllm"
    return Path(os.environ.get("FLEXLLM_STATE_DIR") or default)


def api_key() -> str | None:
    return os.environ.get("FLEXLLM_API_KEY") or None


def shorten_spinning() -> None:
    """Let idle OpenMP threads sleep after a short spin. Call before torch is loaded; child processes inherit it.

    They would spin for milliseconds, which on a machine that does anything else (the HTTP process is enough) keeps off the
    core the very thread they wait for. Sleeping at once costs more than it saves on a quiet one (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


@dataclass(frozen=True)
class SLO:
    """Objectives in seconds. A request attains them if TTFT (queueing included) <= ttft and its mean TPOT <= tpot."""

    ttft: float = 1.0
    tpot: float = 0.1

    def __post_init__(self) -> None:
        require(self.ttft > 0, "ttft", "positive", self.ttft)
        require(self.tpot > 0, "tpot", "positive", self.tpot)


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of the page pool shared by inference and finetuning, and of the finetuning stores."""

    block_size: int = 16  # tokens per page
    num_blocks: int | None = None  # None: from kv_bytes
    kv_bytes: int | None = None  # None: a share of free memory (memory/budget.py)
    finetune_bytes: int | None = None  # saved activations, gradients, optimizer state; None: a share of free memory

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size", "at least 1", self.block_size)
        require(self.num_blocks is None or self.num_blocks >= 1, "num_blocks", "at least 1", self.num_blocks)


@dataclass(frozen=True)
class SchedulerConfig:
    mode: str = "coserve"  # coserve | temporal | inference | finetune
    slo: SLO = field(default_factory=SLO)
    class_slos: Mapping[str, SLO] = field(default_factory=dict)  # per request class, over `slo`
    max_batch_tokens: int = 512  # inference rows per iteration
    max_running: int = 64  # requests holding pages
    max_waiting: int = 4096  # beyond it, new requests are refused (429)
    max_window_rows: int = 512  # finetuning forward rows per iteration
    max_sequences: int = 8  # training sequences in flight, all jobs
    idle_slice: float = 0.5  # seconds of finetuning in an iteration that serves nobody; a request that comes meanwhile interrupts it
    temporal_inference_steps: int = 64  # mode `temporal`: inference iterations between two finetuning ones; 0: dynamic

    def __post_init__(self) -> None:
        require(self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode)
        for name in ("max_batch_tokens", "max_running", "max_waiting", "max_window_rows", "max_sequences"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.idle_slice > 0, "idle_slice", "positive", self.idle_slice)
        require(self.temporal_inference_steps >= 0, "temporal_inference_steps", "0 or more", self.temporal_inference_steps)

    def check_successor(self, other: SchedulerConfig) -> None:
        """ValueError, naming the field, when `other` differs where a running engine cannot: memory was sized by it at the start."""
        for name in ("max_batch_tokens", "max_running", "max_waiting", "max_sequences"):
            require(getattr(other, name) == getattr(self, name), name, f"{getattr(self, name)}, as at the start", getattr(other, name))

    def slo_of(self, request_class: str) -> SLO:
        return self.class_slos.get(request_class, self.slo)

    @property
    def patience(self) -> float:
        """Seconds that a newcomer waits for windows under way; those that would take longer stop at the next layer."""
        return PATIENCE * self._most_urgent.ttft

    @property
    def reserve(self) -> float:
        """Seconds by which running requests are to be ahead before finetuning gets any time. A newcomer's prompt is computed beside the
        tokens that fall due until its TTFT is up. Where those are few, it needs time in which none is due; where they are many
        it can be spread among them."""
        slo = self._most_urgent
        return RESERVE * slo.tpot * min(1.0, SHORT_TTFT * slo.tpot / slo.ttft)

    @property
    def _most_urgent(self) -> SLO:
        return min((self.slo, *self.class_slos.values()), key=lambda slo: slo.ttft)


@dataclass(frozen=True)
class FinetuneConfig:
    learning_rate: float = 2e-4
    num_epochs: int = 3
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_seq_length: int = 1024
    truncate: bool = False  # over-long examples: cut (True) or left out (False); both are counted
    lr_schedule: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    seed: int = 0
    shuffle: bool = True
    max_steps: int | None = None
    eval_every: int | None = None  # optimizer steps; None: each epoch
    checkpoint_every: int | None = None  # optimizer steps; None: each epoch
    priority: float = 1.0  # fair-share weight among the jobs of a tenant
    save_level: str = "auto"  # what the forward stores for the backward, a name of compiler/levels.py; auto: as much as memory allows

    def __post_init__(self) -> None:
        positive = ("num_epochs", "batch_size", "gradient_accumulation_steps", "max_seq_length")
        for name in positive:
            require(isinstance(getattr(self, name), int) and getattr(self, name) >= 1, name, "a positive integer", getattr(self, name))
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "a positive integer", getattr(self, name))
        require(0 < self.learning_rate <= 1, "learning_rate", "in (0, 1]", self.learning_rate)
        require(self.lr_schedule in LR_SCHEDULES, "lr_schedule", f"one of {', '.join(LR_SCHEDULES)}", self.lr_schedule)
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", "in [0, 1)", self.warmup_ratio)
        require(0 <= self.weight_decay <= 1, "weight_decay", "in [0, 1]", self.weight_decay)
        require(self.max_grad_norm >= 0, "max_grad_norm", "0 (off) or positive", self.max_grad_norm)
        require(0 < self.priority <= 100, "priority", "in (0, 100]", self.priority)

    @property
    def group_size(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class EngineConfig:
    model: str | None = None  # a folder, a .gguf file or a hub id; None: the default model
    load_format: str = "auto"  # auto: the model's weights | dummy: random ones, config.json is all it takes
    dtype: str = "auto"
    quantization: str | None = None  # format of the decoder's linears: q8_0 | q4_0 | q4_1; None: dtype
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads of the engine process
    max_model_len: int | None = None  # None: the model's own
    max_adapters: int = 32  # adapters resident at once (serving and training)
    adapter_ranks: int = 1024  # sum of the ranks of all resident adapters
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    state_dir: Path = field(default_factory=state_dir)
    reference_ops: bool = False  # run ops/reference.py instead of the device's own operators
    trace: Path | None = None  # write what every iteration does to this file (tracing.py)

    def __post_init__(self) -> None:
        require(self.load_format in LOAD_FORMATS, "load_format", f"one of {', '.join(LOAD_FORMATS)}", self.load_format)
        require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        known = self.quantization is None or self.quantization in QUANTIZATIONS
        require(known, "quantization", f"one of {', '.join(QUANTIZATIONS)}", self.quantization)
        require(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", self.device)
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2", self.max_model_len)
        require(self.max_adapters >= 1, "max_adapters", "at least 1", self.max_adapters)


@dataclass(frozen=True)
class JobSpec:
    """Everything the engine needs to run (or go on with) a finetuning job. Paths are on the engine's machine."""

    id: str
    train_path: str  # a tokenized dataset, as finetune/data.py writes it
    output_dir: str  # checkpoint-<step>/ folders, resume/ (durable optimizer state)
    valid_path: str | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    peft: PeftConfig = field(default_factory=LoraConfig)
    init_adapter: str | None = None  # a PEFT folder to continue from
    tenant: str = ""  # whose jobs share time with each other before they do with others'
    resume: bool = False  # go on from output_dir/resume if it is there
