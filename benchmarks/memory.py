"""Memory of finetuning: what conventional autograd keeps, and what is left of it after each of the compiler's passes.

Three parts. Shapes: large models and every PEFT method on paper (no weights), in the form of figure 13 of the paper. Levels: all
levels of the default model, predicted, and measured as the allocator's peak during an optimizer step. Speed: the levels in pairs
against the one that keeps everything.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from common import DTYPE, finish, interleave, log, paired_ratio, parser
from conventional import SHAPES, conventional_bytes
from finetune import EngineSteps, finetuning
from flexllm.compiler.levels import JobCompiler, LevelPlan
from flexllm.compiler.remat import ITEMSIZE
from flexllm.compiler.report import job_flops, report_compiler
from flexllm.compiler.workspace import PeakBytes, peak_bytes
from flexllm.config import EngineConfig
from flexllm.engine import Engine
from flexllm.llm import OFFLINE_SCHEDULER
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model
from flexllm.peft.config import BottleneckConfig, Ia3Config, LoraConfig, PeftConfig, PrefixConfig, PromptConfig, VeraConfig
from flexllm.scheduler.fill import MAX_SLICE_ROWS
from processes import Peer

MODELS = ("llama-3.1-8b", "llama-3.1-70b")
TOKENS = (1024, 8192)
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=16),
    "lora-down": LoraConfig(r=16, target_modules=("down_proj",)),
    "dora": LoraConfig(r=16, use_dora=True),
    "ia3": Ia3Config(),
    "adapter": BottleneckConfig(bottleneck=64),
    "adapter-parallel": BottleneckConfig(bottleneck=64, is_parallel=True),
    "prefix": PrefixConfig(num_virtual_tokens=32),
    "prompt": PromptConfig(num_virtual_tokens=32),
    "vera": VeraConfig(r=256),
}
MOST_EXTRA = 0.35  # of forward and backward FLOPs, for the level of the first target
SLICE_ROWS = 512  # rows of a backward slice, whose values are alive while it runs
FLOOR_ROWS = 4  # the same, and of a chunk of logits, where memory is all that counts
HEAD_ROWS = 64  # rows of a chunk of logits
LENGTHS = (512, 1024, 2048)  # of the measured sequences
SHARE = 0.12  # of what PEFT saves: what the level "fitting" may take at its peak
LEVELS = ("recompute", "fitting", "checkpoint", "segments", "kv")


# --------------------------------------------------------------------------------------------------------------- shapes
def on_paper(shape: str, method: str, tokens: int) -> dict[str, Any]:
    """Bytes of one sequence after each pass; `saving` is against conventional autograd, PEFT's defaults (fp32 adapters)."""
    config = ModelConfig.from_hf(SHAPES[shape])
    peft = METHODS[method]
    total = tokens + peft.num_virtual_tokens
    pages = total * config.num_layers * 2 * config.num_kv_heads * config.head_dim * ITEMSIZE
    log_probabilities = total * config.vocab_size * 4
    conventional = {fp32: conventional_bytes(SHAPES[shape], method, tokens, fp32_adapters=fp32) for fp32 in (True, False)}
    checkpointing = conventional_bytes(SHAPES[shape], method, tokens, checkpointing=True)

    job = report_compiler(config, peft, tokens)
    flops = job_flops(job)
    keep, *ladder = (*job.levels("keep"), *job.levels("auto"))
    level = [p for p in ladder if p.level.depth == 1 and p.recomputed_flops <= MOST_EXTRA * flops][-1]
    smallest = [p for p in ladder if p.level.depth == 1][-1]
    (floor,) = job.levels("kv")
    live = keep.saved_bytes // len(job.kinds)  # per row, of a layer whose values are being rebuilt

    def bytes_of(plan: LevelPlan, rows: int, head_rows: int = HEAD_ROWS) -> int:
        stored = total * plan.saved_bytes + pages + head_rows * config.vocab_size * 4
        segment = 0 if plan.level.depth == 1 else sum(c.bytes_per_token for c in plan.choices)
        return stored + rows * (segment + live)

    pruned = total * keep.saved_bytes + pages + log_probabilities
    remat = total * level.saved_bytes + pages + log_probabilities + total * live
    one_layer = conventional[False].layers // config.num_layers  # alive while it is recomputed, when the head is gone
    by_checkpointing = checkpointing.layers - one_layer + max(one_layer, checkpointing.head)
    return {
        "conventional": conventional[True].total,
        "conventional_bf16_adapters": conventional[False].total,
        "checkpointing": by_checkpointing,
        "checkpointing_extra_flops": _forward_share(job, flops),
        "pruned": pruned,
        "rematerialized": remat,
        "compressed": remat,  # the log-sum-exp stands for the probabilities in every column; these methods have no more to compress
        "token_level": bytes_of(level, SLICE_ROWS),
        "level": level.level.name,
        "extra_flops": level.recomputed_flops / flops,
        "saving": 1 - bytes_of(level, SLICE_ROWS) / conventional[True].total,
        "saving_bf16_adapters": 1 - bytes_of(level, SLICE_ROWS) / conventional[False].total,
        "smallest_layerwise": bytes_of(smallest, SLICE_ROWS),
        "smallest_layerwise_extra_flops": smallest.recomputed_flops / flops,
        "floor": bytes_of(floor, FLOOR_ROWS, FLOOR_ROWS),
        "floor_extra_flops": floor.recomputed_flops / flops,
        "saving_floor": 1 - bytes_of(floor, FLOOR_ROWS, FLOOR_ROWS) / conventional[True].total,
        "saving_floor_bf16_adapters": 1 - bytes_of(floor, FLOOR_ROWS, FLOOR_ROWS) / conventional[False].total,
        "floor_bound": 1 - pages / conventional[True].total,  # K/V pages alone
        "gradients_in_flight": total * (level.level.bytes_per_token - level.saved_bytes),
        "gradients_in_flight_floor": total * (floor.level.bytes_per_token - floor.saved_bytes),
    }


def _forward_share(job: JobCompiler, flops: float) -> float:
    """Checkpointing runs every layer's forward again."""
    return sum(job.compilers[k].forward_flops for k in job.kinds) / flops


def table(results: dict[str, dict[str, Any]]) -> None:
    columns = ("conventional", "checkpointing", "pruned", "rematerialized", "compressed", "token_level", "floor")
    log(f"{'GB':34}" + "".join(f"{c:>16}" for c in columns) + f"{'saving':>9}{'FLOPs':>8}{'floor':>8}{'FLOPs':>8}")
    for name, r in results.items():
        sizes = "".join(f"{r[c] / 1e9:16.2f}" for c in columns)
        log(f"{name:34}{sizes}{r['saving']:9.1%}{r['extra_flops']:+8.1%}{r['saving_floor']:8.1%}{r['floor_extra_flops']:+8.1%}")


# ------------------------------------------------------------------------------------------------------------- measured
def allocator_peak(work: Any) -> int:
    """The most bytes that torch's allocator held during `work` beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure_levels(
    engine: Engine, examples: np.ndarray, folder: Path, rounds: int, levels: Sequence[str], limit: float
) -> tuple[dict[str, Any], Any]:
    """Peak bytes of a step, predicted and measured, and speed against "keep", by level. "fitting": the fastest whose predicted
    peak is at most `limit` bytes."""
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    length = examples.shape[1] - 1
    for asked in levels:
        name = _fitting(engine, examples, folder, limit) if asked == "fitting" else asked
        with finetuning(engine, examples, folder, "keep") as keep, finetuning(engine, examples, folder, name) as other:
            plan = engine.trainer.jobs[other.job_id].levels[0]
            seconds = interleave({"keep": _alone(engine, keep, other), name: _alone(engine, other, keep)}, rounds)
            engine.pause_job(keep.job_id)
            measured = allocator_peak(other.step)
        predicted = _predicted(engine, plan, length)
        speed = paired_ratio(seconds["keep"], seconds[name])
        figures[asked] = {
            "level": name,
            "saved_bytes": predicted.saved,
            "predicted_bytes": predicted.total,
            "measured_bytes": measured,
            "predicted_vs_measured": predicted.total / measured,
            "speed_vs_keep": speed.median,
            "speed_vs_keep_spread": speed.as_dict(),
        }
        samples[asked] = seconds
        log(
            f"{length} rows, {name:12} predicted {predicted.total / 1e6:6.1f} MB, measured {measured / 1e6:6.1f} MB "
            f"({predicted.total / measured:.3f}), speed {speed.median:.2f} of keep ({statistics.median(seconds[name]):.2f} s)"
        )
    return figures, samples


def _fitting(engine: Engine, examples: np.ndarray, folder: Path, limit: float) -> str:
    with finetuning(engine, examples, folder, "auto") as steps:
        plans = engine.trainer.jobs[steps.job_id].levels
    length = examples.shape[1] - 1
    return next(p.level.name for p in plans if _predicted(engine, p, length).total <= limit)


def _predicted(engine: Engine, plan: LevelPlan, length: int) -> PeakBytes:
    window = engine.config.scheduler.max_window_rows
    slices = -(-length // MAX_SLICE_ROWS)
    return peak_bytes(plan.job, plan, engine.model.kernels, length, min(window, length), -(-length // slices))


def _alone(engine: Engine, mine: EngineSteps, other: EngineSteps) -> Any:
    def step() -> float:
        engine.pause_job(other.job_id)
        engine.resume_job(mine.job_id)
        return mine.step()

    return step


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    shapes = {}
    for shape in MODELS:
        for tokens in TOKENS:
            for method in METHODS:
                shapes[f"{shape}, {tokens}, {method}"] = on_paper(shape, method, tokens)
    table(shapes)

    model = resolve_model(args.model)
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(
            model=str(model), dtype=DTYPE, device="cpu", threads=args.threads, scheduler=OFFLINE_SCHEDULER, state_dir=Path(scratch)
        )  # fmt: skip
        engine = Engine(config)
        for length in LENGTHS[:1] if args.quick else LENGTHS:
            examples = np.random.default_rng(args.seed).integers(0, engine.model_config.vocab_size, (4, length + 1))
            peer_options = ["--model", str(model), "--rank", "16", "--alpha", "32", "--adapter-fp32"]  # as PEFT is by default
            with Peer("hf_peft.py", *peer_options, threads=args.threads) as peer:
                hf = {c: peer.ask(ids=examples[0].tolist(), checkpointing=c, count=True)["saved_bytes"] for c in (False, True)}
            levels = LEVELS if length == LENGTHS[0] else ("fitting",)
            rounds = 1 if args.quick else 5
            measured, samples[str(length)] = measure_levels(engine, examples, Path(scratch), rounds, levels, SHARE * hf[False])
            for figures in measured.values():
                figures["share_of_peft"] = figures["measured_bytes"] / hf[False]
            results[str(length)] = {
                "peft_saved_bytes": hf[False],
                "peft_checkpointing_saved_bytes": hf[True],
                "levels": measured,
            }
        engine.shutdown()
    everything = [f for r in results.values() for f in r["levels"].values()]
    worst = max(everything, key=lambda f: abs(f["predicted_vs_measured"] - 1))
    fields = {
        "saving": {name: r["saving"] for name, r in shapes.items()},
        "saving_floor": {name: r["saving_floor"] for name, r in shapes.items()},
        "predicted_vs_measured": worst["predicted_vs_measured"],
        "measured": results,
        "shapes": shapes,
    }
    finish("memory", args, fields, samples)


if __name__ == "__main__":
    main()
