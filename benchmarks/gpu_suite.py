"""Requests and finetuning of models of real shapes on one CUDA device, in process. Weights, prompts and training tokens are random.

The experiment of paper.py, measured where that simulates: one pipeline (here always one device), LoRA r16 on down_proj, the paper's
objectives; each load without finetuning and with it. Beside it what the engine and the device reach: decode steps of several batches,
finetuning alone, GEMM FLOP/s and copy bandwidth.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from bounds import training_flops
from client import percentile
from common import finish, log, parser, write
from conventional import SHAPES
from flexllm.config import SLO, EngineConfig, FinetuneConfig, JobSpec, SchedulerConfig
from flexllm.core import InferenceChunk, Request, SamplingParams, StepPlan
from flexllm.engine import Engine
from flexllm.finetune.data import TokenizedDataset
from flexllm.model.config import ModelConfig
from flexllm.peft.config import LoraConfig
from flexllm.simulate.replica import RequestRecord
from flexllm.simulate.workload import Arrival, gamma_arrivals
from paper import ATTAINED, GAP_CV, LENGTH_CV, MEAN_OUTPUT, MEAN_PROMPT, MODELS, PAPER, SEQUENCES, TTFT

RATES = {"llama-3.1-8b": (1.0, 3.0, 5.0), "qwen2.5-14b": (1.0, 3.0), "qwen2.5-32b": (1.0, 2.0)}  # requests per second; the paper: 1 to 5
CONTEXT = 16384
BATCH_TOKENS = 2048
BATCHES = (1, 8, 64)  # decode steps, at DECODE_CONTEXT keys each
DECODE_CONTEXT = 1024
WARMUP = 3.0  # seconds of a run before the first request: whatever has to be compiled
JOB = "job"


def loaded(name: str, tpot: float, window_rows: int, folder: Path) -> Engine:
    """An engine with random weights, and its latency profile taken."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[name]))
    scheduler = SchedulerConfig(slo=SLO(TTFT, tpot), max_running=256, max_batch_tokens=BATCH_TOKENS, max_window_rows=window_rows)
    config = EngineConfig(
        model=str(path), load_format="dummy", device="cuda", dtype="bfloat16", max_model_len=CONTEXT, adapter_ranks=64, scheduler=scheduler,
        state_dir=folder / "state",
    )  # fmt: skip
    began = time.perf_counter()
    engine = Engine(config)
    log(f"{name}: loaded and profiled in {time.perf_counter() - began:.1f} s, {torch.cuda.memory_allocated() / 1e9:.1f} GB held")
    return engine


# ------------------------------------------------------------------------------------------------------------- the device
def device_bounds(model: ModelConfig, rows: int) -> dict[str, float]:
    """FLOP/s of the model's largest GEMM, with rows beside it, and bytes/s of a copy, read plus written."""
    x = torch.randn(rows, model.hidden_size, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(2 * model.intermediate_size, model.hidden_size, dtype=torch.bfloat16, device="cuda")
    source = torch.ones(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    flops = 2.0 * rows * w.numel() / seconds_of(lambda: torch.nn.functional.linear(x, w))
    return {"gemm_flops": flops, "copy_bytes": 2 * source.nbytes / seconds_of(lambda: target.copy_(source))}


def seconds_of(work: Any, repeats: int = 20) -> float:
    """Median of device time."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def decode_steps(engine: Engine, copy_bytes: float) -> dict[str, dict[str, float]]:
    """Seconds of a decode step by batch, beside those of reading the weights and the keys and values once."""
    found = {}
    blocks_each = DECODE_CONTEXT // engine.config.cache.block_size
    for batch in BATCHES:
        pages = [list(range(i * blocks_each, (i + 1) * blocks_each)) for i in range(batch)]
        requests = [Request(f"d{i}", [1] * DECODE_CONTEXT, SamplingParams(temperature=0.0), 0.0, blocks=p) for i, p in enumerate(pages)]
        plan = StepPlan(inference=tuple(InferenceChunk(r, DECODE_CONTEXT - 1, DECODE_CONTEXT, True) for r in requests))
        times = []
        for _ in range(23):
            start = time.perf_counter()
            engine.execute(plan)
            times.append(time.perf_counter() - start)
        kv = batch * DECODE_CONTEXT * engine.cache.bytes_per_block / engine.config.cache.block_size
        bound = (engine.model.weight_bytes + kv) / copy_bytes
        found[str(batch)] = {"ms": 1e3 * median(times[3:]), "bound_ms": 1e3 * bound}
        log(f"  decode, batch {batch}: {found[str(batch)]['ms']:.2f} ms (bound {1e3 * bound:.2f})")
    return found


# --------------------------------------------------------------------------------------------------------------- a load
def start_job(engine: Engine, folder: Path, targets: Sequence[str], lengths: Sequence[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, engine.model_config.vocab_size, sum(lengths)).astype(np.int32)
    path = folder / f"train-{time.monotonic_ns()}.npz"
    TokenizedDataset(ids, np.roll(ids, -1), np.cumsum([0, *lengths])).save(path)
    finetune = FinetuneConfig(num_epochs=1000, batch_size=4, max_seq_length=max(lengths), checkpoint_every=10**6)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=tuple(targets))
    engine.add_job(JobSpec(JOB, str(path), str(folder / "job"), finetune=finetune, peft=lora))


def trained(engine: Engine) -> float:
    """Tokens so far: half of one when it goes forward, half when it comes back."""
    phases = engine.trainer.jobs[JOB].phase_tokens
    return (phases["forward"] + phases["backward"]) / 2


def run(engine: Engine, arrivals: Sequence[Arrival], seconds: float, vocab: int, seed: int) -> dict[str, Any]:
    """Offer arrivals (an open loop) and count for `seconds`; then wait until the last one is answered."""
    rng = random.Random(seed)
    records: dict[str, RequestRecord] = {}
    iterations: list[tuple[float, float]] = []  # predicted and actual seconds
    end_warmup = time.monotonic() + WARMUP
    while time.monotonic() < end_warmup and engine.has_work:
        engine.step()
    start, before, due = time.monotonic(), trained(engine), list(arrivals)
    tokens = 0.0
    while due or (now := time.monotonic() - start) < seconds or any(not r.finished for r in records.values()):
        now = time.monotonic() - start
        while due and due[0].time <= now:
            arrival, name = due.pop(0), f"r{seed}-{len(records)}"
            prompt = [rng.randrange(vocab) for _ in range(arrival.prompt_tokens)]
            sampling = SamplingParams(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True)
            engine.add_request(Request(name, prompt, sampling, start + arrival.time))
            records[name] = RequestRecord(start + arrival.time, arrival.prompt_tokens, arrival.output_tokens)
        if not engine.has_work:
            time.sleep(1e-3)
            continue
        result = engine.step(lambda: max(0.0, time.monotonic() - start - due[0].time) if due else 0.0)
        done = time.monotonic()
        iterations.append((engine.last_step[0].predicted, result.seconds))
        for output in result.outputs:
            record = records[output.request_id]
            if record.tokens == 0:
                record.first = done
            else:
                record.max_gap = max(record.max_gap, done - record.last)
            record.last = done
            record.tokens += 1
        if done - start <= seconds:
            tokens = trained(engine) - before
    return {"records": list(records.values()), "finetune_tok_s": tokens / seconds, "iterations": iterations}


def figures(found: dict[str, Any], slo: SLO) -> dict[str, float]:
    records = found["records"]
    tpots, errors = [r.tpot for r in records if r.tokens > 1], [abs(p - s) / s for p, s in found["iterations"] if p]
    return {
        "requests": len(records),
        "finetune_tok_s": found["finetune_tok_s"],
        "attainment": fmean(r.attains(slo) for r in records),
        "p50_ttft_ms": 1e3 * percentile([r.ttft for r in records], 0.5),
        "p99_ttft_ms": 1e3 * percentile([r.ttft for r in records], 0.99),
        "mean_tpot_ms": 1e3 * fmean(tpots),
        "p99_tpot_ms": 1e3 * percentile(tpots, 0.99),
        "max_gap_ms": 1e3 * max(r.max_gap for r in records),
        "iterations": len(found["iterations"]),
        "prediction_error_p50": percentile(errors, 0.5) if errors else 0.0,
    }


def suite(name: str, args: Any, folder: Path) -> dict[str, Any]:
    """What one model comes to."""
    slo, rates = SLO(TTFT, MODELS[name][1]), args.rates or RATES[name]
    rng = random.Random(args.seed)
    lengths = [rng.randint(*SEQUENCES) for _ in range(64)]
    engine = loaded(name, slo.tpot, args.window_rows, folder)
    model = engine.model_config
    bounds = device_bounds(model, args.window_rows)
    log(f"  GEMM {bounds['gemm_flops'] / 1e12:.0f} TFLOP/s, copy {bounds['copy_bytes'] / 1e12:.2f} TB/s")
    fields: dict[str, Any] = {"bounds": bounds, "slo": asdict(slo), "decode": decode_steps(engine, bounds["copy_bytes"])}
    coserve = engine.config.scheduler
    typical = round(fmean(lengths))
    bound = bounds["gemm_flops"] * typical / training_flops(model, typical, rank=0).total
    fields["finetune_alone"] = {"bound_tok_s": bound}
    for what, targets in (("all_linears", LoraConfig().target_modules), ("down_proj", ("down_proj",))):
        if JOB in engine.trainer.jobs:
            engine.cancel_job(JOB)
        start_job(engine, folder, targets, lengths, args.seed)
        engine.reconfigure(replace(coserve, mode="finetune"))
        found = run(engine, [], args.seconds / 2, model.vocab_size, args.seed)
        fields["finetune_alone"][what] = found["finetune_tok_s"]
        log(f"  finetuning alone, LoRA r16 on {what}: {found['finetune_tok_s']:,.0f} tok/s (bound {bound:,.0f})")
    fields["rates"] = list(rates)
    for mode in ("inference", "coserve"):
        fields[mode] = []
    for i, rate in enumerate(rates):
        arrivals = gamma_arrivals(rate, args.seconds, MEAN_PROMPT, MEAN_OUTPUT, cv=GAP_CV, length_cv=LENGTH_CV, seed=args.seed + i)
        arrivals = [
            replace(a, prompt_tokens=min(a.prompt_tokens, CONTEXT // 2), output_tokens=min(a.output_tokens, 1024)) for a in arrivals
        ]
        for n, mode in enumerate(("inference", "coserve")):
            engine.reconfigure(replace(coserve, mode=mode))
            at = figures(run(engine, arrivals, args.seconds, model.vocab_size, 10 * i + n), slo)
            fields[mode].append(at)
            log(
                f"  {rate:g} requests/s, {mode}: attained {at['attainment']:.0%}, mean TPOT {at['mean_tpot_ms']:.1f} ms, "
                f"finetuning {at['finetune_tok_s']:,.0f} tok/s"
            )
    fields["kept"] = fields["coserve"][-1]["finetune_tok_s"] / fields["coserve"][0]["finetune_tok_s"]
    fields["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return fields


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--rates", type=float, nargs="+", help=f"requests per second (default: {RATES})")
    options.add_argument("--seconds", type=float, help="of arrivals at each rate (default: 10, or 4 with --quick)")
    options.add_argument("--window-rows", type=int, default=4096, help="most finetuning rows of an iteration")
    args = options.parse_args()
    args.seconds = args.seconds or (4.0 if args.quick else 10.0)
    if not torch.cuda.is_available():
        options.error("no CUDA device is available")
    paper = {
        name: {"rates": [1, 5], "finetune_tok_s": rates, "mean_tpot_ms": tpots, "attained": ATTAINED}
        for name, (rates, tpots) in PAPER.items()
    }
    models: dict[str, Any] = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            models[name] = suite(name, args, Path(folder))
        write("gpu_suite", args, {**models, "paper": paper}, [])
        gc.collect()  # the engine's memory, before the next model looks how much is free
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    finish("gpu_suite", args, {**models, "paper": paper}, [])


if __name__ == "__main__":
    main()
