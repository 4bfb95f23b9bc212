"""Whole engines, on a clock of their own, and what Hugging Face + PEFT say of the same work."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from flexllm.batch import FusedBatch
from flexllm.config import SLO, CacheConfig, EngineConfig, FinetuneConfig, JobSpec, SchedulerConfig
from flexllm.core import InferenceChunk, JobEvent, JobStatus, PlanFeatures, Request, SamplingParams, StepPlan, nobody_waits
from flexllm.engine import Engine
from flexllm.finetune.data import IGNORE, TokenizedDataset
from flexllm.model import default_model
from flexllm.peft.config import LoraConfig, PeftConfig
from flexllm.scheduler.jobs import epoch_order
from flexllm.scheduler.latency import LINEAR, SEGMENTS, LatencyModel

TIE = 1e-4  # two logits nearer than this may change places
SCHEDULER = SchedulerConfig(slo=SLO(ttft=1.0, tpot=0.06), max_batch_tokens=64, idle_slice=0.05)

Text = tuple[list[int], list[bool]]  # token ids, and which of them are to be learnt (never the first, always the last)


# ------------------------------------------------------------------------------------------------------------- engines
class RandomClock:
    """Time that passes by chance between two looks, so that slack, and with it every cut of the finetuning work, is arbitrary."""

    def __init__(self, seed: int = 0, longest: float = 0.015) -> None:
        self._rng, self._longest, self.now = random.Random(seed), longest, 0.0

    def __call__(self) -> float:
        self.now += self._rng.uniform(0, self._longest)
        return self.now


class _FixedLatency(LatencyModel):
    """Predictions that depend on the plan alone: neither this machine nor its load decides what a test runs.

    With these costs a backward pass over one text takes several iterations, and is cut within layers.
    """

    COSTS = {"t0": 3e-3, "label_rows": 5e-4, "backward_rows": 3e-4, "backward_slices": 1e-3, "optimizer_steps": 1e-2}

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(LINEAR, 1e-7) | self.COSTS, [1.5e-3] * SEGMENTS)

    def observe(self, features: PlanFeatures, seconds: float) -> None:
        pass


class _Engine(Engine):
    def _latency_profile(self, _report: Callable[[str, float], None]) -> LatencyModel:
        return _FixedLatency()


def open_engine(
    folder: Path | None, dtype: str = "float32", *, num_blocks: int = 256, finetune_bytes: int = 1 << 29, seed: int = 0, **config: Any
) -> Engine:
    """An engine with one thread, known latencies and a random clock. `folder` None: the default model."""
    settings = {"scheduler": SCHEDULER, "adapter_ranks": 128, **config}
    cache = CacheConfig(num_blocks=num_blocks, finetune_bytes=finetune_bytes)
    model = str(folder) if folder else None
    return _Engine(EngineConfig(model=model, dtype=dtype, threads=1, cache=cache, **settings), clock=RandomClock(seed))


@dataclass
class Run:
    """Drives an engine and keeps what it says."""

    engine: Engine
    check: bool = True  # the scheduler's integrity, after every iteration
    waited: Callable[[], float] = nobody_waits
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    events: list[JobEvent] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)

    def step(self) -> None:
        result = self.engine.step(self.waited)
        self.plans.append(self.engine.last_step[0])
        self.events += result.events
        for output in result.outputs:
            assert output.token_id is not None
            self.tokens[output.request_id].append(output.token_id)
        if self.check:
            self.engine.scheduler.check_integrity()

    def until(self, reached: Callable[[], bool], limit: int = 20_000) -> None:
        for _ in range(limit):
            if reached():
                return
            self.step()
        raise AssertionError(f"not reached within {limit} iterations")

    def serve(self, arrivals: Iterable[tuple[int, Request]]) -> None:
        """Add each request at its iteration (they come in order), then go on until nothing is left to do."""
        for iteration, request in arrivals:
            self.until(lambda due=iteration: len(self.plans) >= due)
            self.add(request)
        self.finish()

    def add(self, request: Request) -> None:
        """A request that arrives now."""
        request.arrival = self.engine.clock()
        self.engine.add_request(request)

    def finish(self) -> None:
        """Until nothing is left to do, and what was written in the background has been heard of."""
        self.until(lambda: not self.engine.has_work)
        self.engine.trainer.writer.drain()
        self.step()
        self.engine.trainer.writer.drain()
        self.step()

    def of(self, job_id: str, kind: str = "step") -> list[JobEvent]:
        return [e for e in self.events if e.job_id == job_id and e.kind == kind]

    def losses(self, job_id: str) -> list[float]:
        return [e.loss for e in self.of(job_id) if e.loss is not None]

    def status(self, job_id: str) -> JobStatus | None:
        statuses = [e.status for e in self.of(job_id, "status")]
        return statuses[-1] if statuses else None

    @property
    def shared(self) -> int:
        """Iterations that held rows of requests and of finetuning."""
        return sum(bool(p.inference and (p.windows or p.backward)) for p in self.plans)


def assert_idle(engine: Engine) -> None:
    """Nothing is left of what ran: no pages, bytes, states, adapters in use, or job slots."""
    engine.scheduler.check_integrity()
    engine.blocks.check_integrity()
    engine.adapter_pool.check_integrity()
    assert not engine.has_work
    assert engine.blocks.num_used == 0
    assert engine.finetune_budget.used == 0
    assert not engine.trainer.states
    assert not engine.trainer.jobs
    stats = engine.stats()
    assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
    assert stats["memory"]["activations"] == 0
    assert len(engine.adapter_pool.slots) == stats["adapters"], "a finished job still has its slot"
    for _ in range(stats["adapters"]):  # every resident adapter can be made to leave: nobody is using it
        engine.adapter_pool.free(engine.adapters.allocate_for_training(LoraConfig(r=engine.adapter_pool.capacity)))


def random_requests(rng: random.Random, n: int, vocab: int, adapters: list[str], span: int) -> list[tuple[int, Request]]:
    """(iteration of arrival, greedy request) of any length, for the base model and the adapters."""
    out = []
    for i in range(n):
        prompt = [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 17, 33, rng.randint(3, 90)]))]
        sampling = SamplingParams(max_tokens=rng.randint(1, 40), temperature=0.0, ignore_eos=rng.random() < 0.7)
        out.append((rng.randrange(span), Request(f"r{i}", prompt, sampling, 0.0, adapter=rng.choice([None, *adapters]))))
    return sorted(out, key=lambda item: item[0])


# ----------------------------------------------------------------------------------------------------------------- jobs
def random_texts(rng: random.Random, lengths: Iterable[int], vocab: int) -> list[Text]:
    """Random tokens, two thirds of them to be learnt, and the last one always."""
    texts = []
    for n in lengths:
        learnt = [False, *(rng.random() < 0.67 for _ in range(n - 2)), True]
        texts.append(([rng.randrange(vocab) for _ in range(n)], learnt))
    return texts


def save_texts(path: Path, texts: list[Text]) -> Path:
    """As the engine reads them: row i holds token i, and token i + 1 as its label."""
    ids = np.concatenate([tokens[:-1] for tokens, _ in texts]).astype(np.int32)
    labels = np.concatenate([np.where(learnt[1:], tokens[1:], IGNORE) for tokens, learnt in texts]).astype(np.int32)
    TokenizedDataset(ids, labels, np.cumsum([0, *(len(tokens) - 1 for tokens, _ in texts)])).save(path)
    return path


def job_spec(job_id: str, folder: Path, texts: list[Text], finetune: FinetuneConfig, adapter: PeftConfig, **more: Any) -> JobSpec:
    train = save_texts(folder / f"{job_id}.npz", texts)
    return JobSpec(job_id, str(train), str(folder / job_id), finetune=finetune, peft=adapter, **more)


def final_adapter(spec: JobSpec, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as PEFT reads them."""
    return peft.utils.load_peft_weights(str(Path(spec.output_dir) / f"checkpoint-{step}"), device="cpu")


# --------------------------------------------------------------------------------------------------------------- oracles
def default_hf_model(dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(default_model.folder(), dtype=dtype, attn_implementation="sdpa").eval()


def random_adapter(model: torch.nn.Module, folder: Path, lora: LoraConfig, seed: int, spread: float = 0.2) -> Path:
    """An adapter of `model` that PEFT made and saved, random in A and in B."""
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), use_rslora=lora.use_rslora, task_type="CAUSAL_LM"
    )
    twin = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * spread)
    twin.save_pretrained(folder)
    twin.unload()  # the model is as it was
    return folder


def with_adapter(model: torch.nn.Module, folder: Path | str, trainable: bool = False) -> peft.PeftModel:
    """PEFT with an adapter from disk on a copy of the model."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=trainable)


@torch.no_grad()
def oracle_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[len(ids), V]"""
    return model(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def engine_logits(engine: Engine, ids: list[int], adapter: str | None = None) -> torch.Tensor:
    """[len(ids), V]: the prompt in one iteration, as a request with that adapter has it."""
    slot = engine.adapters.acquire(adapter).id if adapter else -1
    virtual = engine.adapter_pool.slots[slot].virtual_tokens if adapter else 0
    length = virtual + len(ids)
    blocks = engine.blocks.allocate(engine.blocks.blocks_for(length))
    request = Request("probe", [-1] * virtual + ids, SamplingParams(), 0.0, blocks=blocks, adapter_slot=slot)
    plan = StepPlan(inference=(InferenceChunk(request, 0, length, True),))
    batch = FusedBatch.build(plan, engine.cache, engine.adapter_pool, engine.model.rope, {})
    logits = engine.model.logits(engine.model.forward(batch, engine.cache)[virtual:])
    engine.blocks.free(blocks)
    if adapter:
        engine.adapters.release(slot)
    return logits


def assert_same_greedy(got: list[int], want: list[int], prompt: list[int], oracle: torch.nn.Module) -> None:
    """Token by token equal; the first difference, if any, must be between two best logits of the oracle within TIE."""
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    assert at is not None, f"{len(got)} tokens instead of {len(want)}"
    logits = oracle_logits(oracle, prompt + want[:at])[-1]
    behind = float(logits.max() - torch.minimum(logits[got[at]], logits[want[at]]))
    assert behind <= TIE, f"token {at} is {got[at]} instead of {want[at]}, and one of them is {behind:.1e} behind the oracle's best logit"


@dataclass
class Curve:
    """One entry per optimizer step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    orders: list[list[int]] = field(default_factory=list)  # the examples


def train_oracle(model: peft.PeftModel, texts: list[Text], config: FinetuneConfig) -> Curve:
    """The textbook loop over PEFT parameters: torch's AdamW and clipping, transformers' schedule, one text at a time."""
    steps_per_epoch = math.ceil(len(texts) / config.group_size)
    total = min(steps_per_epoch * config.num_epochs, config.max_steps or steps_per_epoch * config.num_epochs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, betas, config.adam_eps, config.weight_decay)
    schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    scheduler = transformers.get_scheduler(schedule, optimizer, math.ceil(config.warmup_ratio * total), total)
    epochs = (epoch_order(config.seed, epoch, len(texts), config.shuffle) for epoch in range(config.num_epochs))
    groups = (order[i : i + config.group_size] for order in epochs for i in range(0, len(order), config.group_size))
    curve = Curve()
    for group in itertools.islice(groups, total):
        labels = sum(sum(texts[i][1]) for i in group)
        loss = 0.0
        for i in group:
            part = text_loss(model, texts[i]) / labels
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        curve.losses.append(loss)
        curve.norms.append(float(norm))
        curve.rates.append(scheduler.get_last_lr()[0])
        curve.orders.append(group)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return curve


def text_loss(model: torch.nn.Module, text: Text) -> torch.Tensor:
    """Summed cross-entropy of the tokens to be learnt."""
    tokens, learnt = torch.tensor(text[0]), torch.tensor(text[1])
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits[learnt[1:]], tokens[1:][learnt[1:]], reduction="sum")
