"""Hugging Face `generate`, one static batch per line on stdin: a baseline of benchmarks/serve.py.

A line `{"prompts": [[ids]...], "output_tokens": n}` holds prompts of equal length; greedy, no early end. The answer is
`{"seconds", "tok_s"}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def generate(model: PreTrainedModel, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_tokens, min_new_tokens=output_tokens, do_sample=False
        )
    seconds = time.perf_counter() - start
    produced = output.numel() - ids.numel()
    assert produced == output_tokens * len(prompts)
    return {"seconds": seconds, "tok_s": produced / seconds}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a Hugging Face folder")
    options.add_argument("--dtype", required=True, choices=("bfloat16", "float32"))
    options.add_argument("--threads", type=int, required=True)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa").eval()
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
