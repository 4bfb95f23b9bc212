"""One finetuning job's tensors and files: dataset, adapter, gradients, optimizer, checkpoints."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexllm.compiler.program import JobProgram, compile_job
from flexllm.config import JobSpec
from flexllm.core import FinetuneJob, JobEvent
from flexllm.finetune.checkpoint import load_resume, save_resume
from flexllm.finetune.data import TokenizedDataset
from flexllm.finetune.optimizer import AdapterOptimizer, GradientLedger
from flexllm.model.decoder import Decoder
from flexllm.peft.io import AdapterFile, load_adapter, save_adapter
from flexllm.peft.lora import Lora
from flexllm.peft.pool import AdapterPool, AdapterSlot

RESUME_FOLDER = "resume"


@dataclass
class LossSums:
    loss: float = 0.0
    labels: int = 0
    correct: int = 0
    sequences: int = 0

    def add(self, loss: float, labels: int, correct: int) -> None:
        self.loss, self.labels, self.correct = self.loss + loss, self.labels + labels, self.correct + correct

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.labels)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.labels)


@dataclass(eq=False)
class TrainingJob:
    """What the trainer holds for one job; `job` is the scheduler's view of it."""

    spec: JobSpec
    job: FinetuneJob
    train: TokenizedDataset
    valid: TokenizedDataset | None
    slot: AdapterSlot
    program: JobProgram
    pool: AdapterPool
    model: Decoder
    base_model: str
    ledger: GradientLedger = field(init=False)
    optimizer: AdapterOptimizer = field(init=False)
    valid_sums: LossSums = field(default_factory=LossSums)
    tokens: int = 0  # rows trained (forward and backward), all steps
    phase_tokens: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})  # rows through all layers, as they go
    last_saved: float = -math.inf  # when the resume state was last written
    write_failed: bool = False  # set by the writer's thread: the job has failed, and nothing more of it is written or announced

    def __post_init__(self) -> None:
        parameters = self.pool.parameters(self.slot)
        self.ledger = GradientLedger(parameters)
        self.optimizer = AdapterOptimizer(parameters, self.spec.finetune, self.job.total_steps)

    # -------------------------------------------------------------------------------------------------------- opening
    @staticmethod
    def open(spec: JobSpec, slot: AdapterSlot, pool: AdapterPool, model: Decoder, base_model: str) -> TrainingJob:
        """Read the data, compile, and initialise the adapter (fresh, from `init_adapter`, or from the resume state).

        Raises ValueError for unreadable data, an init adapter that does not fit, or a dataset longer than the model's context.
        """
        config = spec.finetune
        train = TokenizedDataset.load(spec.train_path)
        valid = TokenizedDataset.load(spec.valid_path) if spec.valid_path else None
        program = compile_job(model.config, [Lora(spec.peft.target_modules, spec.peft.r)], config.save_level, model.kernels)
        job = FinetuneJob(
            id=spec.id,
            lengths=train.lengths,
            label_counts=train.label_counts,
            group_size=config.group_size,
            epochs=config.num_epochs,
            max_steps=config.max_steps,
            seed=config.seed,
            shuffle=config.shuffle,
            weight=config.priority,
            valid_lengths=valid.lengths if valid else (),
            eval_every=config.eval_every,
            num_layers=program.num_layers,
            lowest_layer=program.lowest_layer,
            bytes_per_token=program.bytes_per_token(model.dtype.itemsize) + model.config.hidden_size * model.dtype.itemsize,
        )
        longest = max(*job.lengths, *(job.valid_lengths or (0,)), 0)
        if longest > model.rope[0].shape[0]:
            raise ValueError(f"an example has {longest} tokens; the context holds {model.rope[0].shape[0]}")
        _initialise(spec, slot, pool, model)
        opened = TrainingJob(spec, job, train, valid, slot, program, pool, model, base_model)
        state = load_resume(Path(spec.output_dir) / RESUME_FOLDER) if spec.resume else None
        if state is not None:
            opened._go_on_from(*state)
        return opened

    # ------------------------------------------------------------------------------------------------------- stepping
    def optimizer_step(self, sums: LossSums) -> JobEvent:
        """Apply the group's gradients (summed over labels) divided by the number of labels. FloatingPointError: not finite."""
        self.ledger.label_count = sums.labels
        grad_norm, rate = self.optimizer.step(self.ledger)
        self.ledger.zero()
        self.tokens += sum(s.length for s in self.job.group)
        step = self.job.step + 1  # the scheduler counts it in update()
        return JobEvent(
            self.job.id,
            "step",
            step,
            epoch=step / self.job.steps_per_epoch,
            total_steps=self.job.total_steps,
            loss=sums.mean_loss,
            token_accuracy=sums.accuracy,
            tokens=self.tokens,
            labels=sums.labels,
            grad_norm=grad_norm,
            learning_rate=rate,
        )

    def checkpoint_due(self, step: int) -> bool:
        every = self.spec.finetune.checkpoint_every or self.job.steps_per_epoch
        return step == self.job.total_steps or step % every == 0

    # ---------------------------------------------------------------------------------------------------------- files
    def snapshot_adapter(self) -> AdapterFile:
        """The adapter as it is now, copied (in the masters' precision), so that it can be written while training goes on."""
        return AdapterFile(self.spec.peft, self.base_model, self.pool.export(self.optimizer.masters()))

    def checkpoint_path(self, step: int) -> Path:
        return Path(self.spec.output_dir) / f"checkpoint-{step}"

    def write_checkpoint(self, step: int, adapter: AdapterFile) -> Path:
        path = self.checkpoint_path(step)
        save_adapter(path, adapter)
        return path

    def snapshot_resume(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and numbers from which the job goes on after a crash, at an optimizer-step boundary; copies."""
        return self.optimizer.state_dict(), {"step": self.optimizer.steps, "tokens": self.tokens, "job": self.job.id}

    def write_resume(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        save_resume(Path(self.spec.output_dir) / RESUME_FOLDER, tensors, meta)

    def _go_on_from(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(tensors)
        self.job.step = int(meta["step"])
        self.tokens = int(meta["tokens"])

    def remove_resume(self) -> None:
        shutil.rmtree(Path(self.spec.output_dir) / RESUME_FOLDER, ignore_errors=True)


def _initialise(spec: JobSpec, slot: AdapterSlot, pool: AdapterPool, model: Decoder) -> None:
    """PEFT's initialisation (A uniform in +-1/sqrt(in), B zero), or an existing adapter of the same shape."""
    if spec.init_adapter:
        adapter = load_adapter(spec.init_adapter)
        adapter.check_against(model.config)
        want, got = spec.peft, adapter.config
        if (got.r, got.target_modules, got.scale) != (want.r, want.target_modules, want.scale):
            raise ValueError(
                f"the initial adapter has r={got.r}, lora_alpha={got.lora_alpha}, target_modules={list(got.target_modules)}; "
                f"the job asks for r={want.r}, lora_alpha={want.lora_alpha}, target_modules={list(want.target_modules)}"
            )
        pool.write(slot, adapter.tensors)
        return
    generator = torch.Generator().manual_seed(spec.finetune.seed)
    for name, tensor in pool.parameters(slot).items():
        if name.endswith(".A"):
            bound = 1 / math.sqrt(tensor.shape[1])
            drawn = torch.empty(tensor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            tensor.copy_(drawn)
