"""Upload data, finetune and ask, over HTTP with the official client. First: flexllm serve

python examples/client.py [--url http://127.0.0.1:8000] [--epochs 3]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI

DATA = Path(__file__).parent / "data"
QUESTION = "What should I use to clean the Tovrel H3?"


def ask(client: OpenAI, model: str) -> str:
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0)
    return reply.choices[0].message.content or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key)
    base = client.models.list().data[0].id
    training = client.files.create(file=DATA / "train.jsonl", purpose="fine-tune")
    client.files.wait_for_processing(training.id, poll_interval=0.2)
    hyperparameters = {"n_epochs": args.epochs, "batch_size": 4, "learning_rate_multiplier": 5.0}
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=training.id,
        suffix="tovrel",
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
        extra_body={"peft": {"type": "lora", "r": 16, "lora_alpha": 32}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=10).data):
        print(event.message)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}")
    print("base:     ", ask(client, base))
    print("finetuned:", ask(client, job.fine_tuned_model))


if __name__ == "__main__":
    main()
