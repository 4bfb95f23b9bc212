"""Jobs through the official client, against the fake engine (an optimizer step takes it 20 ms)."""

from __future__ import annotations

import csv
import io
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.conftest import CHAT, MODEL, eventually, training_lines
from tests.api.conftest import wait_for_job as wait

JOB_KEYS = {
    "id", "object", "created_at", "finished_at", "model", "fine_tuned_model", "organization_id", "status", "hyperparameters",
    "training_file", "validation_file", "result_files", "seed", "trained_tokens", "error", "estimated_finish", "integrations",
    "metadata", "method",
}  # fmt: skip


@pytest.fixture
def data(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", training_lines(8)), purpose="fine-tune").id


def create(client: OpenAI, data: str, **options: Any) -> Any:
    return client.fine_tuning.jobs.create(model=MODEL, training_file=data, **options)


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_life_of_a_job(client: OpenAI, http: httpx.Client, data: str) -> None:
    job = create(
        client, data, validation_file=data, suffix="demo", seed=5, metadata={"team": "a"}, method=supervised(n_epochs=6, batch_size=2)
    )
    assert job.status == "validating_files"
    assert (job.seed, job.metadata, job.organization_id) == (5, {"team": "a"}, "org-local")
    assert set(http.get(f"/v1/fine_tuning/jobs/{job.id}").json()) == JOB_KEYS
    wait(client, job.id, "running")
    done = wait(client, job.id, "succeeded")
    assert done.finished_at >= done.created_at
    assert done.trained_tokens == 240
    assert done.fine_tuned_model.startswith(f"ft:{MODEL}:local:demo:")
    assert done.error is None

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))  # over several pages
    assert len({e.id for e in events}) == len(events)
    assert [e.id for e in events] == sorted((e.id for e in events), reverse=True)
    steps = [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data]
    assert steps == list(range(24, 0, -1))
    assert events[0].message == "The job has successfully completed"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [c.step_number for c in checkpoints] == [24, 20, 10]
    assert checkpoints[0].fine_tuned_model_checkpoint == done.fine_tuned_model
    assert checkpoints[1].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-20"
    assert checkpoints[0].metrics.valid_loss == 1.25
    assert checkpoints[1].metrics.train_loss == 0.2
    assert checkpoints[0].fine_tuning_job_id == job.id

    rows = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert [int(r["step"]) for r in rows] == list(range(1, 25))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert rows[-1]["valid_loss"] == "1.25"
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"

    served = client.models.retrieve(done.fine_tuned_model)
    assert served.to_dict()["parent"] == MODEL
    assert client.chat.completions.create(model=done.fine_tuned_model, messages=CHAT).model == done.fine_tuned_model
    assert done.fine_tuned_model in {m.id for m in client.models.list()}
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=done.fine_tuned_model, messages=CHAT)
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)


def test_auto_resolves_to_the_values_used(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"})
    assert job.hyperparameters.to_dict() == {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 1.0}
    wait(client, job.id, "succeeded")


def test_peft_options_in_either_place(client: OpenAI, http: httpx.Client, data: str) -> None:
    peft = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], "use_rslora": True}
    options = {"lr_schedule": "cosine", "warmup_ratio": 0.1, "max_seq_length": 64, "gradient_accumulation_steps": 2, "priority": 2}
    a = create(client, data, extra_body={"peft": peft, "learning_rate": 1e-3, **options}, hyperparameters={"n_epochs": 200})
    b = create(client, data, method=supervised(n_epochs=200, learning_rate_multiplier=5, peft=peft | options))
    shown = []
    for job in (a, b):
        hyperparameters = http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["method"]["supervised"]["hyperparameters"]
        assert hyperparameters["learning_rate_multiplier"] == pytest.approx(5)
        assert hyperparameters["peft"]["target_modules"] == ["q_proj", "v_proj"]
        assert hyperparameters["lr_schedule"] == "cosine"
        shown.append(hyperparameters["peft"])
        client.fine_tuning.jobs.cancel(job.id)
    assert shown[0] == shown[1]


def test_pause_and_resume(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"n_epochs": 100})
    wait(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.pause(job.id)
    before = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].id
    assert client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].id == before
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    eventually(lambda: client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].type == "metrics")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for action in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError):
            action(job.id)


def test_a_job_that_is_paused_before_it_begins(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"n_epochs": 2})
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status in ("validating_files", "queued", "running")
    wait(client, job.id, "succeeded")


def test_a_job_the_engine_refuses_fails(client: OpenAI, data: str) -> None:
    job = create(client, data, extra_body={"peft": {"r": 300}})
    failed = wait(client, job.id, "failed")
    assert failed.error.code == "job_refused"
    assert "300" in failed.error.message
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_the_project_is_the_tenant(client: OpenAI, data: str) -> None:
    job = create(client.with_options(project="broke"), data)
    assert "'broke'" in wait(client, job.id, "failed").error.message


def test_examples_that_are_all_too_long_fail_the_job(client: OpenAI, data: str) -> None:
    job = create(client, data, extra_body={"max_seq_length": 3})
    failed = wait(client, job.id, "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")


def test_list_by_metadata(client: OpenAI, data: str) -> None:
    jobs = [create(client, data, metadata={"k'\"]": str(i % 2), "all": "yes"}, hyperparameters={"n_epochs": 1}) for i in range(3)]
    ids = [job.id for job in jobs]
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"all": "yes"}, limit=2)] == ids[::-1]
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"all": "yes", "k'\"]": "1"})] == [ids[1]]
    assert client.fine_tuning.jobs.list(limit=1).data[0].id == ids[-1]
    for job_id in ids:
        wait(client, job_id, "succeeded")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": -1}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "learning_rate"),
        ({"hyperparameters": {"n_epochs": 2}, "method": supervised(n_epochs=3)}, "n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": 1}, "learning_rate": 1e-4}, "learning_rate"),
        ({"peft": {"type": "dora"}}, "peft.type"),
        ({"peft": {"r": 0}}, "peft.r"),
        ({"peft": {"r": 1.5}}, "peft.r"),
        ({"peft": {"target_modules": ["lm_head"]}}, "peft.target_modules"),
        ({"peft": {"lora_alpha": "big"}}, "peft.lora_alpha"),
        ({"peft": {"type": "ia3", "r": 8}}, "peft.r"),
        ({"peft": {"type": "prefix_tuning", "num_virtual_tokens": 0}}, "peft.num_virtual_tokens"),
        ({"peft": {"lora_dropout": 1.5}}, "peft.lora_dropout"),
        ({"peft": {"alpha": 1}}, "peft.alpha"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"lr_schedule": "zigzag"}, "lr_schedule"),
        ({"max_seq_length": 10**6}, "max_seq_length"),
        ({"warmup_ratio": 2}, "warmup_ratio"),
        ({"priority": -1}, "priority"),
        ({"training_file": "file-unknown"}, "training_file"),
        ({"validation_file": "file-unknown"}, "validation_file"),
        ({"model": "unknown"}, "model"),
    ],
)
def test_bad_job_fields_are_named(http: httpx.Client, data: str, change: dict[str, Any], param: str) -> None:
    before = http.get("/v1/fine_tuning/jobs", params={"limit": 1000}).json()["data"]
    response = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": data} | change)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"].startswith(param)
    assert len(http.get("/v1/fine_tuning/jobs", params={"limit": 1000}).json()["data"]) == len(before)


def test_unknown_jobs(client: OpenAI, http: httpx.Client) -> None:
    for call in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause):
        with pytest.raises(openai.NotFoundError):
            call("ftjob-unknown")
    for path in ("events", "checkpoints"):
        assert http.get(f"/v1/fine_tuning/jobs/ftjob-unknown/{path}").status_code == 404
    assert http.get("/v1/fine_tuning/jobs", params={"colour": "red"}).status_code == 400
