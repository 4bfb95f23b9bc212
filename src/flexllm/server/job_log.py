"""What a job's owner can read: messages, metrics, and the result file made of them."""

from __future__ import annotations

import csv
import io
import time
from typing import Any

from flexllm.core import JobEvent
from flexllm.server.store import EventRecord, JobRecord, Store

RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class JobLog:
    def __init__(self, store: Store) -> None:
        self._store = store

    def message(self, job_id: str, text: str, level: str = "info") -> None:
        self._insert(job_id, text, level, None)

    def step(self, job: JobRecord, event: JobEvent) -> None:
        """An optimizer step that nobody knew of."""
        assert event.step > job.step
        job.step, job.total_steps, job.trained_tokens = event.step, event.total_steps, event.tokens
        self._store.jobs.update(job)
        data = {
            "step": event.step,
            "total_steps": event.total_steps,
            "epoch": event.epoch,
            "train_loss": event.loss,
            "train_mean_token_accuracy": event.token_accuracy,
            "tokens": event.tokens,
            "labels": event.labels,
            "grad_norm": event.grad_norm,
            "learning_rate": event.learning_rate,
            "save_level": event.save_level,
        }
        self._insert(job.id, f"Step {event.step}/{event.total_steps}: training loss={_figure(event.loss)}", "info", data)

    def validation(self, job: JobRecord, event: JobEvent) -> None:
        if event.step <= job.valid_step:
            return
        job.valid_step = event.step
        self._store.jobs.update(job)
        data = {"step": event.step, "valid_loss": event.loss, "valid_mean_token_accuracy": event.token_accuracy}
        self._insert(job.id, f"Step {event.step}/{event.total_steps}: validation loss={_figure(event.loss)}", "info", data)

    def result_csv(self, job_id: str) -> str:
        """A row per optimizer step."""
        steps: dict[int, dict[str, Any]] = {}
        for record in self._store.events.all(owner=job_id):
            if record.data is not None:
                row = steps.setdefault(record.data["step"], {})
                row.update(record.data)
                row["train_accuracy"] = row.get("train_mean_token_accuracy")
        text = io.StringIO()
        writer = csv.DictWriter(text, RESULT_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(steps[step] for step in sorted(steps))
        return text.getvalue()

    def _insert(self, job_id: str, text: str, level: str, data: dict[str, Any] | None) -> None:
        record = EventRecord(id=self._store.new_id("ftevent"), created_at=int(time.time()), job_id=job_id, message=text, level=level)
        if data is not None:
            record.type, record.data = "metrics", data
        self._store.events.insert(record)


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
