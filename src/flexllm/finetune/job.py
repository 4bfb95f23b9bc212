"""One finetuning job's tensors and files: dataset, adapter, gradients, optimizer, checkpoints."""

from __future__ import annotations

import math
import random
import shutil
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexllm.compiler.levels import JobCompiler, LevelPlan, LevelProgram
from flexllm.config import JobSpec
from flexllm.core import FinetuneJob, JobEvent, Sequence
from flexllm.finetune.checkpoint import load_resume, save_resume
from flexllm.finetune.data import TokenizedDataset
from flexllm.finetune.optimizer import AdapterOptimizer, GradientLedger
from flexllm.finetune.step_log import LOG_FILE, log_text
from flexllm.finetune.window import IGNORED
from flexllm.model.decoder import Decoder
from flexllm.model.layer import site_shapes
from flexllm.peft.base import Binding
from flexllm.peft.io import AdapterFile, load_adapter, save_adapter
from flexllm.peft.pool import AdapterPool, AdapterSlot

RESUME_FOLDER = "resume"
RETOLD = 100  # of the last steps, which a resume state tells again: a process that was killed may have had no time to tell of them


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
    levels: tuple[LevelPlan, ...]  # as in `job.levels`
    pool: AdapterPool
    model: Decoder
    base_model: str
    ledger: GradientLedger = field(init=False)
    optimizer: AdapterOptimizer = field(init=False)
    valid_sums: LossSums = field(default_factory=LossSums)
    tokens: int = 0  # rows trained (forward and backward), all steps
    # Rows through all layers, as they go; in the backward each layer counts for its share, or a slow job would seem to stand still.
    phase_tokens: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    last_saved: float = -math.inf  # when the resume state was last written
    told: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=RETOLD))  # the last steps
    _programs: dict[int, LevelProgram] = field(default_factory=dict)
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
        virtual = slot.virtual_tokens
        lengths = [n + virtual for n in train.lengths]
        compiler = compile_backward(model, slot, sum(lengths) // (2 * max(1, len(lengths))))
        levels = compiler.levels(config.save_level)
        job = FinetuneJob(
            id=spec.id,
            lengths=lengths,
            label_counts=train.label_counts,
            group_size=config.group_size,
            epochs=config.num_epochs,
            max_steps=config.max_steps,
            seed=config.seed,
            shuffle=config.shuffle,
            weight=config.priority,
            tenant=spec.tenant,
            valid_lengths=[n + virtual for n in valid.lengths] if valid else (),
            eval_every=config.eval_every,
            num_layers=compiler.num_layers,
            lowest_layer=compiler.lowest_layer,
            levels=tuple(plan.level for plan in levels),
        )
        longest = max(*job.lengths, *(job.valid_lengths or (0,)), 0)
        if longest > model.rope[0].shape[0]:
            raise ValueError(f"an example has {longest} tokens; the context holds {model.rope[0].shape[0]}")
        _initialise(spec, slot, pool, model)
        opened = TrainingJob(spec, job, train, valid, slot, levels, pool, model, base_model)
        state = load_resume(Path(spec.output_dir) / RESUME_FOLDER) if spec.resume else None
        if state is not None:
            opened._go_on_from(*state)
        return opened

    def program(self, level: int) -> LevelProgram:
        """The job's compiled layers at one of its levels."""
        if level not in self._programs:
            self._programs[level] = self.levels[level].program()
        return self._programs[level]

    def example(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a training or validation sequence, the adapter's virtual tokens before them."""
        data = self.train if sequence.train else self.valid
        assert data is not None, "a validation sequence of a job without validation data"
        ids, labels = data.example(sequence.example)
        virtual = self.slot.virtual_tokens
        return np.pad(ids, (virtual, 0), constant_values=-1), np.pad(labels, (virtual, 0), constant_values=IGNORED)

    def dropout_seed(self, sequence: Sequence) -> int | None:
        """Of a training sequence: another in each step, the same when a step is done again."""
        if not sequence.train or not self.spec.peft.dropout:
            return None
        return random.Random(f"{self.spec.finetune.seed}:{self.job.step}:{sequence.example}").getrandbits(62)

    # ------------------------------------------------------------------------------------------------------- stepping
    def optimizer_step(self, sums: LossSums) -> JobEvent:
        """Apply the group's gradients (summed over labels) divided by the number of labels. FloatingPointError: not finite."""
        self.ledger.label_count = sums.labels
        grad_norm, rate = self.optimizer.step(self.ledger)
        self.model.refresh_adapter(self.pool, self.slot)
        self.ledger.zero()
        self.tokens += sum(s.length for s in self.job.group)
        step = self.job.step + 1  # the scheduler counts it in update()
        event = JobEvent(
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
            save_level=self.job.levels[max(s.level for s in self.job.group)].name,
        )
        self.told.append(event)
        return event

    def checkpoint_due(self, step: int) -> bool:
        every = self.spec.finetune.checkpoint_every or self.job.steps_per_epoch
        return step == self.job.total_steps or step % every == 0

    # ---------------------------------------------------------------------------------------------------------- files
    def snapshot_adapter(self) -> AdapterFile:
        """The adapter as it is now, copied (in the masters' precision), so that it can be written while training goes on."""
        tensors = self.pool.parameters(self.slot, trainable=False) | self.optimizer.masters()
        return AdapterFile(self.spec.peft, self.base_model, {n: t.detach().clone() for n, t in tensors.items()})

    def write_checkpoint(self, adapter: AdapterFile, told: SequenceOf[JobEvent]) -> Path:
        """The adapter as it was after the last of the steps `told`."""
        path = Path(self.spec.output_dir) / f"checkpoint-{told[-1].step}"
        save_adapter(path, adapter, self.model.config, {LOG_FILE: log_text(told)})
        return path

    def snapshot_resume(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and numbers from which the job goes on after a crash, at an optimizer-step boundary; copies."""
        told = [asdict(event) for event in self.told]
        return self.optimizer.state_dict(), {"step": self.optimizer.steps, "tokens": self.tokens, "job": self.job.id, "told": told}

    def write_resume(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        save_resume(Path(self.spec.output_dir) / RESUME_FOLDER, tensors, meta)

    def _go_on_from(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(tensors)
        self.model.refresh_adapter(self.pool, self.slot)
        self.job.step = int(meta["step"])
        self.tokens = int(meta["tokens"])
        self.told.extend(JobEvent(**event) for event in meta.get("told", ()))

    def remove_resume(self) -> None:
        shutil.rmtree(Path(self.spec.output_dir) / RESUME_FOLDER, ignore_errors=True)


def compile_backward(model: Decoder, slot: AdapterSlot, context: int) -> JobCompiler:
    """For an adapter of its own. `context`: mean number of keys that a row of its sequences sees."""
    binding = Binding(slot.kind, slot.method, slot.features, slot.rank)
    adapted = slot.config.layers(model.config.num_layers)
    rounded = 1 << context.bit_length()  # jobs of about the same lengths share what is compiled
    key = (binding, adapted, rounded)
    if key not in model.backward_compilers:
        model.backward_compilers[key] = JobCompiler(
            model.config, binding, adapted, model.kernels, model.costs, rounded, model.dtype.itemsize
        )
    return model.backward_compilers[key]


def _initialise(spec: JobSpec, slot: AdapterSlot, pool: AdapterPool, model: Decoder) -> None:
    """The method's own initialisation, or an existing adapter of the same settings."""
    if not slot.config.layers(model.config.num_layers):
        raise ValueError(f"layers_to_transform names no layer of the model, which has {model.config.num_layers}")
    generator = torch.Generator().manual_seed(spec.finetune.seed)
    everything = pool.parameters(slot) | pool.parameters(slot, trainable=False)
    for name, tensor in everything.items():
        slot.method.initialise(spec.peft, name.removeprefix("layers."), tensor, generator, site_shapes(model.config))
    if spec.init_adapter:
        adapter = load_adapter(spec.init_adapter).fitted(model.config)
        want, got = spec.peft.tensors_depend_on, adapter.config.tensors_depend_on
        if want != got:
            raise ValueError(f"the initial adapter is {got}; the job asks for {want}")
        pool.write(slot, adapter.tensors)
    model.refresh_adapter(pool, slot)
