"""Sharing changes nothing: neither what requests are answered, nor what a job learns, whoever else is in the iterations."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexllm.config import SLO, FinetuneConfig, JobSpec
from flexllm.core import JobStatus, Request, SamplingParams
from flexllm.engine import Engine
from flexllm.peft.config import LINEARS, LoraConfig
from tests.oracle.engines import (
    Run,
    assert_idle,
    assert_same_greedy,
    final_adapter,
    job_spec,
    open_engine,
    random_adapter,
    random_requests,
    random_texts,
    with_adapter,
)
from tests.oracle.harness import VOCAB, random_hf_model

ADAPTERS = {
    "narrow": LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
    "wide": LoraConfig(r=12, lora_alpha=9),
    "odd": LoraConfig(r=5, target_modules=("k_proj", "o_proj", "down_proj"), use_rslora=True),
}
FINETUNE = FinetuneConfig(learning_rate=5e-3, num_epochs=2, batch_size=3, gradient_accumulation_steps=2)
LENGTHS = [30, 64, 11, 90, 2, 47, 26, 71, 8, 55, 33, 19, 40]
OTHER = LoraConfig(r=7, target_modules=("q_proj", "up_proj"), use_rslora=True)


@dataclasses.dataclass
class World:
    """A tiny model with three adapters on disk. Jobs of the same name are the same job."""

    folder: Path
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.hf = random_hf_model("llama", self.folder / "model", self.dtype)
        self.adapters = {n: random_adapter(self.hf, self.folder / n, c, seed=i) for i, (n, c) in enumerate(ADAPTERS.items())}
        self.oracles: dict[str | None, torch.nn.Module] = {None: self.hf, **{n: with_adapter(self.hf, p) for n, p in self.adapters.items()}}
        self._runs = 0

    def engine(self, **config: Any) -> Engine:
        engine = open_engine(self.folder / "model", str(self.dtype).removeprefix("torch."), **config)
        for name, path in self.adapters.items():
            engine.register_adapter(name, path)
        return engine

    def spec(self, lora: LoraConfig = LoraConfig(r=4), config: FinetuneConfig = FINETUNE, seed: int = 2, **more: Any) -> JobSpec:
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        folder.mkdir()
        texts = random_texts(random.Random(seed), LENGTHS, VOCAB)
        return job_spec("job", folder, texts, config, lora, **more)

    def alone(self, **spec: Any) -> tuple[Run, JobSpec]:
        """A job with the engine to itself."""
        run, made = Run(self.engine()), self.spec(**spec)
        run.engine.add_job(made)
        run.finish()
        return run, made

    def requests(self, n: int = 30, span: int = 150, seed: int = 0) -> list[tuple[int, Request]]:
        return random_requests(random.Random(seed), n, VOCAB, list(self.adapters), span)

    def assert_same_answers(self, got: Run, want: Run, requests: list[tuple[int, Request]]) -> None:
        for _, r in requests:
            assert_same_greedy(got.tokens[r.id], want.tokens[r.id], r.prompt_ids, self.oracles[r.adapter])


@pytest.fixture
def exact(tmp_path: Path) -> World:
    return World(tmp_path, torch.float64)


@pytest.fixture
def single(tmp_path: Path) -> World:
    return World(tmp_path, torch.float32)


def assert_same_training(run: Run, spec: JobSpec, alone: Run, alone_spec: JobSpec) -> None:
    """Equal to rounding, which is float64's. The clipped norm enters every step, so nothing is left out of it."""
    steps, wanted = run.of(spec.id), alone.of(alone_spec.id)
    assert run.status(spec.id) is JobStatus.SUCCEEDED
    assert [e.step for e in steps] == [e.step for e in wanted]
    for what in ("loss", "grad_norm", "learning_rate", "labels", "token_accuracy", "tokens"):
        assert [getattr(e, what) for e in steps] == pytest.approx([getattr(e, what) for e in wanted], rel=1e-8), what
    assert_same_adapter(spec, alone_spec, steps[-1].step)


def assert_same_adapter(spec: JobSpec, other: JobSpec, step: int) -> None:
    got, want = final_adapter(spec, step), final_adapter(other, step)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert float((got[name] - tensor).abs().max()) <= 1e-8 * float(tensor.abs().max()), name


# -------------------------------------------------------------------------------------------------------------- requests
def test_requests_do_not_notice_a_job(single: World) -> None:
    """30 greedy requests for four models in one engine, with two jobs in the same iterations and without."""
    quiet = Run(single.engine(seed=1))
    quiet.serve(single.requests())
    assert_idle(quiet.engine)
    busy = Run(single.engine(seed=2))
    busy.engine.add_job(single.spec())
    busy.engine.add_job(dataclasses.replace(single.spec(lora=OTHER), id="other"))
    requests = single.requests()
    busy.serve(requests)
    assert busy.shared > 50
    single.assert_same_answers(busy, quiet, requests)
    assert_idle(busy.engine)


def test_answers_are_those_of_the_oracle(single: World) -> None:
    """Not only the same with and without a job, but right: what Hugging Face and PEFT would say next at every token."""
    run = Run(single.engine())
    run.engine.add_job(single.spec())
    requests = single.requests(n=15, span=60)
    run.serve(requests)
    for _, r in requests:
        oracle, got = single.oracles[r.adapter], run.tokens[r.id]
        with torch.no_grad():
            best = oracle(input_ids=torch.tensor([r.prompt_ids + got[:-1]])).logits[0].argmax(-1)
        assert_same_greedy(got, best[len(r.prompt_ids) - 1 :].tolist(), r.prompt_ids, oracle)
        assert len(got) == r.sampling.max_tokens or (got[-1] == 2 and not r.sampling.ignore_eos)


def test_preempted_requests_give_the_same_tokens(single: World) -> None:
    """Pages for a fifth of what is wanted: requests lose theirs, wait and are computed again; a job goes on beside them."""
    roomy = Run(single.engine())
    roomy.serve(single.requests(span=20))
    tight = Run(single.engine(num_blocks=13))
    spec = single.spec()
    tight.engine.add_job(spec)
    requests = single.requests(span=20)
    tight.serve(requests)
    assert tight.engine.scheduler.num_preemptions > 3
    single.assert_same_answers(tight, roomy, requests)
    assert tight.status(spec.id) is JobStatus.SUCCEEDED
    assert_idle(tight.engine)


def test_requests_keep_the_version_they_started_with(single: World) -> None:
    """A newer adapter under the same name, in mid-answer: who was there goes on with the old one, who comes gets the new one."""
    newer = random_adapter(single.hf, single.folder / "newer", ADAPTERS["narrow"], seed=99)
    run = Run(single.engine())
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(5, 80))] for rng in map(random.Random, range(8))]
    sampling = SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True)
    requests = [Request(f"r{i}", prompt, sampling, 0.0, adapter="wide") for i, prompt in enumerate(prompts)]
    for request in requests[:4]:
        run.add(request)
    run.until(lambda: all(len(run.tokens[r.id]) > 2 for r in requests[:2]))
    run.engine.register_adapter("wide", newer)
    for request in requests[4:]:
        run.add(request)
    run.finish()
    for i, request in enumerate(requests):
        oracle = single.oracles["wide"] if i < 4 else with_adapter(single.hf, newer)
        got = run.tokens[request.id]
        with torch.no_grad():
            best = oracle(input_ids=torch.tensor([request.prompt_ids + got[:-1]])).logits[0].argmax(-1)
        assert_same_greedy(got, best[len(request.prompt_ids) - 1 :].tolist(), request.prompt_ids, oracle)
    assert run.engine.adapters.resident == 1, "the old version left with its last request"
    assert_idle(run.engine)


# ------------------------------------------------------------------------------------------------------------------ jobs
def test_job_does_not_notice_requests(exact: World) -> None:
    alone, alone_spec = exact.alone()
    run, spec = Run(exact.engine(seed=3)), exact.spec()
    run.engine.add_job(spec)
    run.serve(exact.requests(n=40, span=250))
    assert run.shared > 30
    assert_same_training(run, spec, alone, alone_spec)
    assert_idle(run.engine)


@pytest.mark.parametrize("seed", range(3))
def test_interruptions_change_nothing(seed: int, exact: World) -> None:
    """Finetuning that gives way at any layer of the forward, within the head or between backward slices goes on there another time, all of
    its rows at once or in parts."""
    alone, alone_spec = exact.alone()
    requests = exact.requests(n=20, span=150)
    answers = Run(exact.engine(seed=3))
    answers.serve(exact.requests(n=20, span=150))
    rng = random.Random(seed)
    engine, spec = exact.engine(seed=3), exact.spec()

    def waited() -> float:
        engine.reconfigure(dataclasses.replace(engine.config.scheduler, max_window_rows=rng.choice([7, 512])))
        return 10.0 if rng.random() < 0.2 else 0.0

    run = Run(engine, waited=waited)
    run.engine.add_job(spec)
    run.serve(requests)
    cut = [p for p in run.plans if p.interrupted]
    whole = {(w.sequence, w.start): w.end for p in cut for w, _ in p.suspended}
    assert any(w.end < whole.get((w.sequence, w.start), 0) for p in run.plans for w in p.windows if w.layer), "in parts"
    assert any(not p.windows and not p.backward for p in cut), "in the forward"
    assert any(p.windows or p.backward for p in cut), "in the backward"
    assert {w.layer for p in run.plans for w in p.windows} == set(range(run.engine.model_config.num_layers + 1)), "goes on anywhere"
    assert_same_training(run, spec, alone, alone_spec)
    run_answers = {r.id: run.tokens[r.id] for _, r in requests}
    assert run_answers == {r.id: answers.tokens[r.id] for _, r in requests}
    assert_idle(run.engine)


@pytest.mark.parametrize("ttft", [1e6, 1e-6])
def test_windows_that_end_within_the_patience_are_kept(ttft: float, single: World) -> None:
    run, spec = Run(single.engine(), waited=lambda: 1e-6), single.spec()
    run.engine.reconfigure(dataclasses.replace(run.engine.config.scheduler, slo=SLO(ttft=ttft)))
    job = run.engine.add_job(spec)
    run.step()
    (plan,) = run.plans
    assert bool(plan.windows) == (ttft > 1) == any(s.forward > 0 for s in job.group)


def test_job_survives_page_pressure(exact: World) -> None:
    """Requests take the job's pages again and again, in the forward and in mid-backward: sequences start over, whole groups
    too, and nothing is counted twice."""
    alone, alone_spec = exact.alone()
    run, spec = Run(exact.engine(num_blocks=16)), exact.spec()
    job = run.engine.add_job(spec)
    rng = random.Random(0)
    moments = [lambda: any(q.backward_begun and q.blocks for q in job.group), lambda: any(0 < q.forward < q.length for q in job.group)]
    for burst in range(5):
        run.until(moments[burst % 2])
        for i in range(6):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(40, 90))]
            run.add(Request(f"{burst}-{i}", prompt, SamplingParams(max_tokens=20, temperature=0.0), 0.0))
        run.until(lambda: run.engine.scheduler.num_waiting + run.engine.scheduler.num_running == 0)
    run.finish()
    assert sum(len(p.released) for p in run.plans) > 5
    assert sum(len(p.restarted) for p in run.plans) > 1
    assert_same_training(run, spec, alone, alone_spec)
    assert_idle(run.engine)


def test_pause_and_resume(exact: World) -> None:
    alone, alone_spec = exact.alone()
    run, spec = Run(exact.engine()), exact.spec()
    job = run.engine.add_job(spec)
    for steps, iterations in ((1, 3), (1, 9), (2, 1)):  # at various points of a step
        run.until(lambda wanted=steps: job.step >= wanted)
        start = len(run.plans)
        run.until(lambda wanted=start + iterations: len(run.plans) >= wanted)
        run.engine.pause_job(spec.id)
        run.serve(exact.requests(n=3, span=1, seed=steps))
        assert run.status(spec.id) is JobStatus.PAUSED
        assert run.engine.blocks.num_used == 0, "a paused job holds no pages"
        run.engine.resume_job(spec.id)
        before = len(run.of(spec.id))
        run.until(lambda wanted=before + 1: len(run.of(spec.id)) >= wanted)
    run.finish()
    assert_same_training(run, spec, alone, alone_spec)
    assert_idle(run.engine)


@pytest.mark.parametrize("iterations", [2, 7, 12, 20])
def test_cancelling_another_job(iterations: int, exact: World) -> None:
    """Wherever the other job is in its step, it leaves nothing behind and takes nothing with it."""
    alone, alone_spec = exact.alone()
    run, spec = Run(exact.engine()), exact.spec()
    run.engine.add_job(spec)
    run.engine.add_job(dataclasses.replace(exact.spec(lora=OTHER), id="other"))
    run.until(lambda: len(run.plans) >= iterations)
    run.engine.cancel_job("other")
    assert {s.job.id for s in run.engine.trainer.states} <= {spec.id}
    run.finish()
    assert_same_training(run, spec, alone, alone_spec)
    assert_idle(run.engine)


def test_two_jobs_learn_what_each_learns_alone(exact: World) -> None:
    """Different ranks, targets, save levels, group sizes and data, under load."""
    config = dataclasses.replace(FINETUNE, batch_size=2, gradient_accumulation_steps=1, save_level="keep", seed=9)
    settings: list[dict[str, Any]] = [{}, {"lora": OTHER, "config": config, "seed": 8}]
    specs = [dataclasses.replace(exact.spec(**s), id=f"job-{i}") for i, s in enumerate(settings)]
    run = Run(exact.engine())
    for spec in specs:
        run.engine.add_job(spec)
    run.serve(exact.requests())
    assert any(len({w.sequence.job.id for w in p.windows}) == 2 for p in run.plans), "windows of both jobs in one iteration"
    for spec, settings_alone in zip(specs, settings, strict=True):
        assert_same_training(run, spec, *exact.alone(**settings_alone))
    assert_idle(run.engine)


def test_validation_changes_nothing(exact: World) -> None:
    alone, alone_spec = exact.alone()
    valid = exact.spec(seed=6).train_path
    run, spec = Run(exact.engine()), exact.spec(config=dataclasses.replace(FINETUNE, eval_every=2), valid_path=valid)
    run.engine.add_job(spec)
    run.serve(exact.requests())
    assert [e.step for e in run.of(spec.id, "validation")] == [2, 4, 6]
    assert_same_training(run, spec, alone, alone_spec)
    assert_idle(run.engine)


@pytest.mark.parametrize("killed_at", [1, 2, 5])
def test_killed_job_goes_on(killed_at: int, exact: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after a step, without a word; a new one goes on from the durable state as if nothing had happened, and tells of
    the steps that the first one did."""
    alone, alone_spec = exact.alone()
    monkeypatch.setattr("flexllm.finetune.trainer.RESUME_INTERVAL", 0.0)  # durable after every step
    first, spec = Run(exact.engine(seed=5)), exact.spec()
    job = first.engine.add_job(spec)
    first.until(lambda: job.step >= killed_at)
    first.step()  # into the next step
    first.engine.trainer.writer.drain()
    del first.engine

    second = Run(exact.engine(seed=6))
    job = second.engine.add_job(dataclasses.replace(spec, resume=True))
    assert job.step == killed_at
    second.serve(exact.requests(n=10))
    assert_same_training(second, spec, alone, alone_spec)
    assert_idle(second.engine)


# -------------------------------------------------------------------------------------------------- what must not change
def test_weights_and_other_adapters_stay_bit_identical(single: World) -> None:
    run = Run(single.engine())
    requests = single.requests()
    run.serve(requests)  # every adapter is resident
    engine = run.engine

    def everything() -> Iterator[torch.Tensor]:
        model = engine.model
        yield from (model.embed, model.final_norm, model.head.weight)
        for layer in model.layers:
            values = (getattr(layer, f.name) for f in dataclasses.fields(layer))
            yield from (v if isinstance(v, torch.Tensor) else v.weight for v in values if v is not None)
        for slot in resident:
            yield from engine.adapter_pool.parameters(slot).values()

    resident = list(engine.adapter_pool.slots.values())
    assert len(resident) == len(ADAPTERS)
    before = [t.clone() for t in everything()]
    engine.add_job(single.spec(lora=LoraConfig(r=8, target_modules=LINEARS)))
    late = single.requests(seed=3)
    run.serve([(i + len(run.plans), dataclasses.replace(r, id=f"late-{r.id}", blocks=[], output_ids=[])) for i, r in late])
    assert run.shared > 20
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_aborts_and_cancellations_leave_nothing(seed: int, single: World) -> None:
    """Requests aborted while waiting, prefilling and decoding, jobs cancelled anywhere: memory comes back, the rest goes on."""
    rng = random.Random(seed)
    run = Run(single.engine(num_blocks=rng.choice([20, 128]), seed=seed))
    specs = [dataclasses.replace(single.spec(), id=f"job-{i}") for i in range(3)]
    requests = single.requests(n=40, span=80, seed=seed)
    alive = list(specs[:2])
    for spec in specs:
        run.engine.add_job(spec)
    while requests:
        while requests and requests[0][0] <= len(run.plans):
            run.add(requests.pop(0)[1])
        run.step()
        if rng.random() < 0.3:
            run.engine.abort_request(f"r{rng.randrange(40)}")
        if alive and rng.random() < 0.03:
            run.engine.cancel_job(alive.pop().id)
    for spec in alive:
        run.engine.cancel_job(spec.id)
    run.finish()
    assert run.status(specs[2].id) is JobStatus.SUCCEEDED
    assert_idle(run.engine)
