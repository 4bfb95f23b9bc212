"""Finetune an adapter and ask base and finetuned model the same question, in one process.

python examples/offline.py [--model MODEL] [--epochs 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexllm import LLM, LoraConfig, SamplingParams
from flexllm.config import FinetuneConfig
from flexllm.core import JobEvent

DATA = Path(__file__).parent / "data"
QUESTION = [{"role": "user", "content": "What should I use to clean the Tovrel H3?"}]


def show(event: JobEvent) -> None:
    if event.kind in ("step", "validation"):
        print(f"{event.kind} {event.step}/{event.total_steps}: loss {event.loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or Hugging Face id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", default="tovrel-adapter")
    args = parser.parse_args()

    with LLM(args.model) as llm:
        config = FinetuneConfig(num_epochs=args.epochs, learning_rate=1e-3)
        adapter = llm.finetune(
            DATA / "train.jsonl", LoraConfig(r=16), config, output_dir=args.output, valid=DATA / "valid.jsonl", callback=show
        )
        greedy = SamplingParams(max_tokens=40, temperature=0)
        print("base:     ", llm.chat(QUESTION, greedy)[0].text)
        print("finetuned:", llm.chat(QUESTION, greedy, adapter=adapter)[0].text)


if __name__ == "__main__":
    main()
