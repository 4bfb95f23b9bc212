"""The engine at its edges: what it refuses, what fails, and that it goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexllm.config import CacheConfig, EngineConfig, FinetuneConfig, JobSpec
from flexllm.core import FinishReason, JobStatus, PlanFeatures, Request, SamplingParams
from flexllm.engine import Engine, OverloadedError
from flexllm.peft.config import LoraConfig
from flexllm.peft.pool import PoolFullError
from flexllm.scheduler.latency import VERSION
from tests.oracle.engines import SCHEDULER, Run, assert_idle, job_spec, open_engine, random_adapter, random_texts
from tests.oracle.harness import VOCAB, random_hf_model

LORA = LoraConfig(r=4)
FINETUNE = FinetuneConfig(num_epochs=1, batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and adapters of it: `good`, and `foreign` for a model of another shape."""
    folder = tmp_path_factory.mktemp("engine")
    random_adapter(random_hf_model("llama", folder / "model", torch.float32), folder / "good", LORA, seed=0)
    random_adapter(random_hf_model("qwen3", folder / "other", torch.float32), folder / "foreign", LORA, seed=0)
    return folder


@pytest.fixture
def engine(folder: Path) -> Engine:
    return open_engine(folder / "model")


def request(request_id: str = "r", length: int = 8, adapter: str | None = None, max_tokens: int = 5, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    return Request(request_id, [3 + i % 100 for i in range(length)], params, 0.0, adapter=adapter)


def spec(folder: Path, job_id: str = "job", lengths: tuple[int, ...] = (20, 30, 9), lora: LoraConfig = LORA, **more: Any) -> JobSpec:
    return job_spec(job_id, folder, random_texts(random.Random(0), lengths, VOCAB), more.pop("finetune", FINETUNE), lora, **more)


def assert_goes_on(engine: Engine) -> None:
    """It still serves, and still trains."""
    run = Run(engine)
    run.add(request("afterwards"))
    run.finish()
    assert len(run.tokens["afterwards"]) == 5
    assert_idle(engine)


# -------------------------------------------------------------------------------------------------------------- requests
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(length=256), "256"),
        (request(length=5000), "5000"),
        (dataclasses.replace(request(), prompt_ids=[]), "empty"),
        (dataclasses.replace(request(), prompt_ids=[1, VOCAB]), f"{VOCAB}"),
        (dataclasses.replace(request(), prompt_ids=[1, -1]), "-1"),
        (request(logit_bias={VOCAB + 5: 1.0}), f"logit_bias .*{VOCAB + 5}"),
        (request(stop_token_ids=(VOCAB,)), "stop token"),
        (request(adapter="nobody"), "unknown adapter 'nobody'"),
    ],
)
def test_request_refused(bad: Request, message: str, engine: Engine) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add_request(bad)
    assert_goes_on(engine)


def test_duplicate_request_id(engine: Engine) -> None:
    run = Run(engine)
    run.add(request("twice"))
    with pytest.raises(ValueError, match="twice"):
        engine.add_request(request("twice"))
    run.finish()
    run.add(request("twice"))  # free again
    run.finish()
    assert len(run.tokens["twice"]) == 10
    assert_idle(engine)


def test_overload(folder: Path) -> None:
    engine = open_engine(folder / "model", scheduler=dataclasses.replace(SCHEDULER, max_waiting=3))
    engine.register_adapter("good", folder / "good")
    for i in range(3):
        engine.add_request(request(f"r{i}"))
    with pytest.raises(OverloadedError, match="3 requests"):
        engine.add_request(request("one too many", adapter="good"))
    Run(engine).finish()
    assert_goes_on(engine)


def test_finish_reasons(engine: Engine) -> None:
    """The context is full, max_tokens are there, a stop token came."""
    run, reasons = Run(engine), {}
    run.add(request("context", length=250, max_tokens=50))
    run.add(request("tokens"))
    while engine.has_work:
        for output in engine.step().outputs:
            run.tokens[output.request_id].append(output.token_id)
            reasons[output.request_id] = output.finish_reason
    assert reasons == {"context": FinishReason.LENGTH, "tokens": FinishReason.LENGTH}
    assert len(run.tokens["context"]) == 6, "prompt and answer fill the context of 256"
    stop = run.tokens["tokens"][2]
    engine.add_request(request("stopped", stop_token_ids=(stop,)))
    outputs = [o for _ in range(20) for o in engine.step().outputs]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert [o.token_id for o in outputs] == run.tokens["tokens"][: run.tokens["tokens"].index(stop) + 1]
    assert_idle(engine)


def test_abort_of_nobody(engine: Engine) -> None:
    engine.abort_request("nobody")
    assert_goes_on(engine)


# -------------------------------------------------------------------------------------------------------------- adapters
def damaged(folder: Path, target: Path, change: Callable[[Path], None]) -> Path:
    target.mkdir()
    for file in (folder / "good").iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    change(target)
    return target


def truncate(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def poison(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")


def claim_rank(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "truncated"),
        (poison, "finite"),
        (claim_rank, "rank 9"),
        (lambda a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "cannot be read"),
    ],
    ids=["truncated", "not finite", "rank", "no config", "bad config"],
)
def test_damaged_adapter(change: Callable[[Path], None], message: str, folder: Path, tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(ValueError, match=message):
        engine.register_adapter("bad", damaged(folder, tmp_path / "bad", change))
    with pytest.raises(ValueError, match="unknown adapter"):
        engine.add_request(request(adapter="bad"))
    assert_goes_on(engine)


def test_adapter_of_another_model(folder: Path, engine: Engine) -> None:
    with pytest.raises(ValueError, match="another base model"):
        engine.register_adapter("foreign", folder / "foreign")
    assert_goes_on(engine)


def test_adapter_beyond_the_pool(folder: Path, tmp_path: Path) -> None:
    engine = open_engine(folder / "model", adapter_ranks=3)
    with pytest.raises(ValueError, match="rank 4"):
        engine.register_adapter("good", folder / "good")
    with pytest.raises(PoolFullError, match="rank 4"):
        engine.add_job(spec(tmp_path))
    assert_goes_on(engine)


def test_adapter_slots_run_out_and_come_back(folder: Path) -> None:
    """Room for one adapter: a second has to wait until nobody uses the first, then takes its place."""
    engine = open_engine(folder / "model", adapter_ranks=4)
    engine.register_adapter("a", folder / "good")
    engine.register_adapter("b", folder / "good")
    run = Run(engine)
    run.add(request("first", adapter="a"))
    with pytest.raises(PoolFullError):
        engine.add_request(request("second", adapter="b"))
    run.finish()
    run.add(request("second", adapter="b"))
    run.finish()
    assert run.tokens["second"] == run.tokens["first"]
    assert_idle(engine)


# ------------------------------------------------------------------------------------------------------------------ jobs
def test_job_refused(folder: Path, tmp_path: Path) -> None:
    engine = open_engine(folder / "model", num_blocks=12)
    good = spec(tmp_path)
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    bad = {
        "300 tokens; the context holds 256": spec(tmp_path, "long", (20, 301)),
        "does not fit in the K/V cache": spec(tmp_path, "wide", (20, 250)),
        "no such tokenized dataset": dataclasses.replace(good, train_path=str(tmp_path / "nowhere.npz")),
        "damaged": dataclasses.replace(good, train_path=str(tmp_path / "broken.npz")),
        "the job asks for {'type': 'lora', 'r': 4": dataclasses.replace(
            good, init_adapter=str(folder / "good"), peft=LoraConfig(r=4, target_modules=("q_proj",))
        ),
        "another base model": dataclasses.replace(good, init_adapter=str(folder / "foreign")),
    }
    for message, job in bad.items():
        with pytest.raises(ValueError, match=message):
            engine.add_job(job)
        assert_idle(engine)
    engine.add_job(good)
    with pytest.raises(ValueError, match="'job'"):
        engine.add_job(good)
    run = Run(engine)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    assert_goes_on(engine)


def test_unknown_job(engine: Engine) -> None:
    for act in (engine.pause_job, engine.resume_job, engine.cancel_job):
        with pytest.raises(ValueError, match="unknown job 'nobody'"):
            act("nobody")


def assert_failed(run: Run, job_id: str, message: str) -> None:
    """The owner hears of it, once."""
    (event,) = (e for e in run.of(job_id, "status"))
    assert event.status is JobStatus.FAILED
    assert message in event.message


@pytest.mark.parametrize("checkpoint_every", [1, None], ids=["at the first step", "at the last step"])
def test_unwritable_output(checkpoint_every: int | None, folder: Path, tmp_path: Path) -> None:
    """A job whose files cannot be written fails; requests and another job go on."""
    engine = open_engine(folder / "model")
    (tmp_path / "file").write_text("not a folder")
    config = dataclasses.replace(FINETUNE, checkpoint_every=checkpoint_every, num_epochs=2)
    engine.add_job(dataclasses.replace(spec(tmp_path, finetune=config), output_dir=str(tmp_path / "file" / "job")))
    engine.add_job(spec(tmp_path, "other"))
    run = Run(engine)
    run.serve([(3 * i, request(f"r{i}", 30)) for i in range(4)])
    assert_failed(run, "job", "could not write")
    assert run.status("other") is JobStatus.SUCCEEDED
    assert all(len(run.tokens[f"r{i}"]) == 5 for i in range(4))
    assert_goes_on(engine)


@pytest.mark.parametrize("lengths", [(20, 30, 9), (20, 30)], ids=["steps were left", "the only step"])
def test_gradients_that_are_not_finite(lengths: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    """The job fails, with its weights as they were before the step; nobody else in its iterations notices."""
    quiet = Run(open_engine(folder / "model"))
    quiet.serve([(0, request(f"r{i}", 30)) for i in range(4)])
    huge = tmp_path / "huge"
    huge.mkdir()
    (huge / "adapter_config.json").write_bytes((folder / "good" / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "good" / "adapter_model.safetensors")
    save_file({n: t * 1e28 for n, t in tensors.items()}, huge / "adapter_model.safetensors")
    engine = open_engine(folder / "model")
    good = spec(tmp_path, "good")
    engine.add_job(dataclasses.replace(spec(tmp_path, lengths=lengths), init_adapter=str(huge), peft=LORA))
    engine.add_job(good)
    run = Run(engine)
    run.serve([(0, request(f"r{i}", 30)) for i in range(4)])
    assert_failed(run, "job", "gradient norm is")
    assert run.status("good") is JobStatus.SUCCEEDED
    assert run.tokens == quiet.tokens
    assert not list((tmp_path / "job").glob("checkpoint-*"))
    assert_goes_on(engine)


def test_shutdown_makes_jobs_durable(folder: Path, tmp_path: Path) -> None:
    engine = open_engine(folder / "model", state_dir=tmp_path / "state")
    (tmp_path / "state" / "profiles").mkdir(parents=True)
    config = dataclasses.replace(FINETUNE, num_epochs=3)
    job = engine.add_job(spec(tmp_path, finetune=config))
    run = Run(engine)
    run.until(lambda: job.step == 4)
    engine.shutdown()
    again = open_engine(folder / "model")
    assert again.add_job(dataclasses.replace(spec(tmp_path, finetune=config), resume=True)).step == 4
    rest = Run(again)
    rest.finish()
    assert [e.step for e in rest.of("job")] == [1, 2, 3, 4, 5, 6]  # those that are done are told again
    assert rest.of("job")[:4] == run.of("job")
    assert not (tmp_path / "job" / "resume").exists(), "a finished job leaves no state to go on from"


def test_shutdown_tells_what_no_step_has_told(folder: Path, tmp_path: Path) -> None:
    engine = open_engine(folder / "model", state_dir=tmp_path / "state")
    (tmp_path / "state" / "profiles").mkdir(parents=True)
    job = engine.add_job(spec(tmp_path))
    Run(engine).until(lambda: job.step == job.total_steps)  # its files are still being written
    assert JobStatus.SUCCEEDED in [event.status for event in engine.shutdown()]


# -------------------------------------------------------------------------------------------------------------- settings
def test_settings_change_while_it_runs(tmp_path: Path, engine: Engine) -> None:
    engine.add_job(spec(tmp_path))
    run = Run(engine)
    run.add(request("r", max_tokens=40))
    scheduler = engine.config.scheduler
    engine.reconfigure(dataclasses.replace(scheduler, mode="inference", max_window_rows=4))
    run.until(lambda: len(run.plans) == 5)
    assert not any(p.windows or p.backward for p in run.plans)
    engine.reconfigure(dataclasses.replace(scheduler, max_window_rows=4))
    with pytest.raises(ValueError, match="max_running"):
        engine.reconfigure(dataclasses.replace(scheduler, max_running=scheduler.max_running + 1))
    assert engine.config.scheduler.max_running == scheduler.max_running
    run.finish()
    assert 0 < max(p.window_rows for p in run.plans) <= 4
    assert len(run.tokens["r"]) == 40
    assert_idle(engine)


# ----------------------------------------------------------------------------------------------------------------- state
def test_stats(folder: Path, tmp_path: Path, engine: Engine) -> None:
    engine.register_adapter("good", folder / "good")
    engine.add_job(spec(tmp_path, lengths=(60, 50)))
    run = Run(engine)
    for i in range(3):
        run.add(request(f"r{i}", 40, adapter="good", max_tokens=60))
    run.until(lambda: any(p.backward and p.inference for p in run.plans))
    stats = engine.stats()
    assert json.loads(json.dumps(stats)).keys() == stats.keys(), "plain values, for the wire"
    plan = run.plans[-1]
    step = stats["step"]
    assert (step["decode"] + step["prefill"], step["window"], step["backward"]) == (
        plan.inference_rows,
        plan.window_rows,
        plan.backward_rows,
    )
    assert step["seconds"] > 0
    layers_done = sum(work.rows * work.num_layers for p in run.plans for work in p.backward)
    backward = stats["finetune_tokens"]["job"]["backward"]
    assert 0 < backward == pytest.approx(layers_done / engine.model_config.num_layers), "not only whole sequences count"
    assert stats["num_running"] == 3
    assert stats["adapters"] == 1
    assert 0 < stats["kv_usage"] < 1
    memory = stats["memory"]
    assert memory["kv_cache"] == engine.blocks.num_used * engine.cache.bytes_per_block < memory["kv_cache_total"]
    assert memory["weights"] == sum(p.nbytes for p in _parameters(folder / "model"))
    assert memory["activations"] > 0
    assert memory["optimizer"] > 0
    run.finish()
    assert engine.stats()["memory"]["optimizer"] == 0
    assert_idle(engine)


def _parameters(model: Path) -> list[torch.Tensor]:
    """Of the linears and the embedding; norms are not counted."""
    return [t for t in load_file(model / "model.safetensors").values() if t.ndim == 2]


def test_profile_is_taken_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        str(folder / "model"),
        dtype="float32",
        threads=1,
        cache=CacheConfig(num_blocks=64, finetune_bytes=1 << 28),
        scheduler=dataclasses.replace(SCHEDULER, max_window_rows=32),
        state_dir=tmp_path,
    )
    heard: list[str] = []
    first = Engine(config, progress=lambda what, _: heard.append(what))
    assert {"loading the model", "measuring this machine", "ready"} <= set(heard)
    assert_goes_on(first)
    profile, costs = sorted((tmp_path / "profiles").iterdir(), key=lambda p: len(p.name))
    assert costs.name == profile.stem + ".costs.json"

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("flexllm.engine.take_profile", refuse)
        assert Engine(config).latency.coefficients() == pytest.approx(_stored(first))
    measured = profile.read_text()
    first.latency.fit([(PlanFeatures(rows=1, decode_rows=1), 9.0)])
    first.shutdown()
    assert profile.read_text() == measured, "what was learned from a few requests says little about others"
    profile.write_text("{")
    assert_goes_on(Engine(config))
    assert json.loads(profile.read_text())["version"] == VERSION, "a damaged profile is measured again"


def _stored(engine: Engine) -> dict[str, float]:
    return type(engine.latency).load(engine._profile_path()).coefficients()
