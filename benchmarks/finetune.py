"""LoRA finetuning: this engine against Hugging Face + PEFT, on the same token batches in the same run.

Default model, rank 16 on seven linears, batch 1, AdamW, sequences of 512 and 1024 rows that all have labels. The
engine runs in this process and PEFT in another; their steps alternate. PEFT runs as it is fastest (adapters of the model's type, SDPA),
with and without gradient checkpointing.

saved bytes: for PEFT, every storage autograd keeps for the backward, parameters left out; for the engine, the activation
store at its fullest plus the sequence's K/V pages.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bounds import MachineBounds, measure_bounds, training_flops
from common import DTYPE, finish, interleave, log, paired_ratio, parser
from flexllm.config import EngineConfig, FinetuneConfig, JobSpec
from flexllm.engine import Engine
from flexllm.finetune.data import TokenizedDataset
from flexllm.llm import OFFLINE_SCHEDULER
from flexllm.memory.kv_cache import KVCache
from flexllm.model.loader import resolve_model
from flexllm.peft.config import LoraConfig
from processes import Peer

RANK, ALPHA = 16, 32
LENGTHS = (512, 1024)
LEARNING_RATE = 1e-4


class EngineSteps:
    """A finetuning job in an engine of its own, advanced one optimizer step at a time."""

    def __init__(self, engine: Engine, job_id: str) -> None:
        self._engine = engine
        self.job_id = job_id
        self.peak_activations = 0  # bytes
        self.losses: list[float] = []

    def step(self) -> float:
        """Seconds of one optimizer step."""
        start = time.perf_counter()
        while True:
            result = self._engine.step()
            self.peak_activations = max(self.peak_activations, self._engine.stats()["memory"]["activations"])
            for event in result.events:
                if event.kind == "step" and event.job_id == self.job_id:
                    assert event.loss is not None
                    self.losses.append(event.loss)
                    return time.perf_counter() - start


@contextmanager
def finetuning(engine: Engine, examples: np.ndarray, folder: Path, save_level: str = "auto") -> Iterator[EngineSteps]:
    """A job over `examples` [count, rows + 1] of token ids, in their order, one per optimizer step."""
    count, width = examples.shape
    rows = width - 1
    dataset = TokenizedDataset(
        examples[:, :-1].reshape(-1).astype(np.int32), examples[:, 1:].reshape(-1).astype(np.int32), np.arange(count + 1) * rows
    )
    path = folder / f"train-{rows}.npz"
    dataset.save(path)
    config = FinetuneConfig(
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_ratio=0.0,
        num_epochs=1000,
        batch_size=1,
        max_seq_length=rows + 1,
        shuffle=False,
        max_grad_norm=0.0,
        checkpoint_every=10**9,
        save_level=save_level,
    )
    job_id = f"bench-{rows}-{save_level}"
    engine.add_job(JobSpec(job_id, str(path), str(folder / job_id), finetune=config, peft=LoraConfig(r=RANK, lora_alpha=ALPHA)))
    try:
        yield EngineSteps(engine, job_id)
    finally:
        engine.cancel_job(job_id)


def compare(engine: Engine, peer: Peer, bounds: MachineBounds, rows: int, rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """One sequence length: figures, and under `samples` the seconds of every step."""
    vocab = engine.model_config.vocab_size
    examples = np.random.default_rng(seed + rows).integers(0, vocab, (rounds + 2, rows + 1))
    turns = {name: iter(examples.tolist()) for name in ("peft", "peft_checkpointing")}
    peer_losses: list[float] = []

    def peer_step(name: str, checkpointing: bool) -> Callable[[], float]:
        def step() -> float:
            answer = peer.ask(ids=next(turns[name]), checkpointing=checkpointing, count=False)
            if not checkpointing:
                peer_losses.append(answer["loss"])
            return float(answer["seconds"])

        return step

    with finetuning(engine, examples, folder) as ours:
        last = examples[-1].tolist()
        saved = {name: peer.ask(ids=last, checkpointing="check" in name, count=True)["saved_bytes"] for name in turns}
        contestants = {"flexllm": ours.step, "peft": peer_step("peft", False), "peft_checkpointing": peer_step("peft_checkpointing", True)}
        seconds = interleave(contestants, rounds)
        m = engine.model_config
        pages = rows * KVCache.bytes_per_token(m.num_layers, m.num_kv_heads, m.head_dim, engine.model.dtype)
        our_saved = ours.peak_activations + pages
        losses = {"flexllm": ours.losses, "peft": peer_losses}
    flops = training_flops(engine.model_config, rows, RANK)
    speedup = paired_ratio(seconds["peft"], seconds["flexllm"])
    speedup_checkpointing = paired_ratio(seconds["peft_checkpointing"], seconds["flexllm"])
    rate = rows / statistics.median(seconds["flexllm"])
    bound = rows / (flops.total / bounds.gemm_flops)
    log(
        f"{rows} rows: {rate:.0f} tok/s (bound {bound:.0f}), {speedup.median:.2f}x PEFT, {our_saved / saved['peft']:.2f} of its saved bytes"
    )
    return {
        "rows": rows,
        "speedup_vs_peft": speedup.median,
        "speedup_vs_peft_spread": speedup.as_dict(),
        "speedup_vs_peft_checkpointing": speedup_checkpointing.median,
        "speedup_vs_peft_checkpointing_spread": speedup_checkpointing.as_dict(),
        "saved_bytes": our_saved,
        "saved_bytes_peft": saved["peft"],
        "saved_bytes_peft_checkpointing": saved["peft_checkpointing"],
        "saved_bytes_ratio": our_saved / saved["peft"],
        "tok_s": rate,
        "tok_s_peft": rows / statistics.median(seconds["peft"]),
        "tok_s_peft_checkpointing": rows / statistics.median(seconds["peft_checkpointing"]),
        "bound_tok_s": bound,
        "gflop_per_step": flops.total / 1e9,
        "samples": {"seconds": seconds, "losses": losses},
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--adapter-fp32", action="store_true", help="run PEFT with its default, fp32 adapters (slower, and more bytes saved)"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rounds = 2 if args.quick else 7
    model = resolve_model(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=str(model),
            dtype=DTYPE,
            device="cpu",
            threads=args.threads,
            scheduler=OFFLINE_SCHEDULER,
            state_dir=Path(scratch),
        )
        engine = Engine(config)
        bounds = measure_bounds(engine.model_config, LENGTHS[0], engine.model.dtype)
        peer_options = ["--model", str(model), "--rank", str(RANK), "--alpha", str(ALPHA), "--seed", str(args.seed)]
        peer_options += ["--adapter-fp32"] if args.adapter_fp32 else []
        with Peer("hf_peft.py", *peer_options, threads=args.threads) as peer:
            results = [compare(engine, peer, bounds, rows, rounds, args.seed, Path(scratch)) for rows in LENGTHS]
        engine.shutdown()
    samples = {str(r["rows"]): r.pop("samples") for r in results}
    worst = min(results, key=lambda r: r["speedup_vs_peft"])
    figures = {k: v for k, v in worst.items() if not k.endswith("_spread")}
    finish("finetune", args, {**figures, "by_rows": {str(r["rows"]): r for r in results}, "bounds": bounds.as_dict()}, samples)


if __name__ == "__main__":
    main()
