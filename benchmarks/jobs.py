"""A finetuning job on our server, started through the API."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from processes import Server
from workloads import training_texts

LORA_RANK = 16
TEXT_WORDS = 110  # about 256 tokens
TEXTS, EPOCHS = 200, 50  # some 2.5 million tokens: more than any benchmark trains
PATIENCE = 120.0  # seconds


def start_job(server: Server, folder: Path, seed: int) -> str:
    """Upload made-up texts, create a LoRA job that outlasts the benchmark, and wait until it runs; returns its id.

    Raises RuntimeError when the job fails or does not run within PATIENCE.
    """
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=PATIENCE)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts(TEXTS, TEXT_WORDS, seed)))
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    client.files.wait_for_processing(uploaded.id)
    hyperparameters: Any = {"n_epochs": EPOCHS, "batch_size": 1}
    job = client.fine_tuning.jobs.create(
        model=server.model,
        training_file=uploaded.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"peft": {"type": "lora", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}},
    )
    deadline = time.monotonic() + PATIENCE
    while (found := client.fine_tuning.jobs.retrieve(job.id)).status != "running":
        if found.status in ("failed", "cancelled", "succeeded") or time.monotonic() > deadline:
            raise RuntimeError(f"the job is {found.status}, not running: {found.error}")
        time.sleep(0.1)
    return job.id
