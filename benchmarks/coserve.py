"""Co-serving: requests under an SLO while a LoRA job trains in what they leave over, against everything else one could do.

A grid: traces x loads x objectives, and in every cell all contestants, awake one at a time, with the same requests: one server
of this engine, told to serve alone, to co-serve under each of the objectives, to finetune, or to share its time; with
--vllm-python also a machine split in two (vLLM on some of the cores, PEFT training on the rest) and both on all cores.
Objectives scale with h, the decode step at batch 8 measured here over 13 ms (the same on an A100 for an 8B model).
README.md has the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import common
from common import DTYPE, QUICK_RESULTS, finish, log, parser, write
from contestants import PATIENCE, Ours, VllmBesidePeft, capacity, decode_step_seconds, row_seconds
from flexllm.model.config import ModelConfig
from flexllm.model.loader import resolve_model
from grid import ATTAINED, LOADS, REFERENCE_STEP, SLOS, SPLITS, Phase, Sample, Slos, cell_figures, grid_figures, own_slo, slos_here
from processes import Peer, flexllm_server, freezer, memory_bytes, vllm_server
from workloads import TRACES, Load, Trace, load_of, shorter_here

# Of the phase's seconds, by contestant. Attainment is decided by single requests, so those that it is about have the most of them.
# A job alone has iterations of half a second, whose tokens come in lumps: its phase is to hold enough of them.
EVERY_ROUND = {
    "inference-loose": 1.0,
    "coserve-loose": 1.0,
    "finetune": 0.6,
    "inference-strict": 1.0,
    "coserve-strict": 1.0,
    **dict.fromkeys(SPLITS, 1.0),
}
FIRST_ROUND = 0.5  # of the others, which have no further rounds
VLLM_BESIDE_PEFT = (*SPLITS, "contending")
OURS = "flexllm"  # our server: its log and its state
CAPACITY_CONCURRENCY, CAPACITY_WARMUP, CAPACITY_SECONDS, CAPACITY_REQUESTS = 16, 2.0, 8.0, 400
WARMUP = (4.0, 1.5)  # requests per second, seconds: every server has seen requests before it is measured
MEMORY = ("--kv-cache-gb", "0.5", "--finetune-gb", "0.6")
# Seconds, roughly, for the estimate alone: the start of our server and of one of vLLM, and a phase beside its arrivals.
START, START_VLLM, OVERHEAD = 60.0, 75.0, 4.5

Run = Callable[[Load], Phase]


@dataclass(frozen=True)
class Setting:
    """What does not change from cell to cell."""

    args: argparse.Namespace
    model: Path
    vocab_size: int
    traces: list[Trace]
    folder: Path

    def load(self, trace: Trace, start: int, rate: float, seconds: float) -> Load:
        return load_of(trace.take(start, rate, seconds), seconds, self.vocab_size, self.args.seed + start)

    @property
    def warmup(self) -> Load:
        return self.load(self.traces[0], 0, *WARMUP)


# ---------------------------------------------------------------------------------------------------------- who takes part
def all_contestants(args: argparse.Namespace) -> list[str]:
    """Those that are in every round first, so that what is compared is side by side."""
    coserve = [f"{mode}-{slo}" for slo in SLOS if not (args.quick and slo == "mid") for mode in ("inference", "coserve")]
    temporal = [f"temporal-{steps or 'dynamic'}" for steps in args.temporal]
    vllm = [*training_cores(args.cores), "contending"] if args.vllm_python else []
    found = {"finetune", *coserve, *temporal, *vllm}
    return [*(n for n in EVERY_ROUND if n in found), *(n for n in (*coserve, *temporal, *vllm) if n not in EVERY_ROUND)]


def training_cores(cores: Sequence[int]) -> dict[str, Sequence[int]]:
    """By split, the cores that train, the last ones. Fewer than four make only halves, a single one nothing."""
    found = {name: max(1, round(len(cores) * share)) for name, share in SPLITS.items()}
    return {name: cores[-n:] for name, n in found.items() if len(cores) >= (2 if name == "split" else 4)}


def contestant_names(args: argparse.Namespace) -> list[str]:
    """All of them, or those that `--contestants` picks."""
    return [n for n in all_contestants(args) if args.contestants is None or n in args.contestants]


def scheduler_settings(name: str, slos: Slos) -> dict[str, Any]:
    """What makes our server this contestant."""
    ttft, tpot = slos[own_slo(name)]
    found: dict[str, Any] = {"mode": "coserve", "slo": {"ttft": ttft, "tpot": tpot}}
    if name.startswith("inference-"):
        found["mode"] = "inference"
    elif name.startswith("temporal-"):
        steps = name.removeprefix("temporal-")
        found |= {"mode": "temporal", "temporal_inference_steps": 0 if steps == "dynamic" else int(steps)}
    return found


def run_ours(ours: Ours, slos: Slos, names: list[str]) -> dict[str, Run]:
    return {name: partial(ours.run, scheduler_settings(name, slos)) for name in names if name not in VLLM_BESIDE_PEFT}


def start_vllm_beside_peft(stack: contextlib.ExitStack, setting: Setting, names: list[str], processes: dict[str, int]) -> dict[str, Run]:
    """In a split each has its cores to itself; contending, both have all of them. They share the PEFT process."""
    cores, found = setting.args.cores, {}
    peer = stack.enter_context(Peer("hf_peft.py", "--model", str(setting.model), threads=len(cores)))
    processes["peft"] = peer.pid
    for name in names:
        training = training_cores(cores).get(name, cores)
        serving = cores[: -len(training)] or cores
        server = stack.enter_context(vllm_server(setting.args.vllm_python, setting.model, setting.folder / f"{name}.log", serving))
        processes[name] = server.process.pid
        stack.enter_context(freezer(server))
        found[name] = VllmBesidePeft(server, peer, training, setting.vocab_size, setting.args.seed).run
    return found


# ------------------------------------------------------------------------------------------------------------ measuring
def estimated_seconds(args: argparse.Namespace) -> float:
    """Of the whole run, roughly."""
    names = contestant_names(args)
    cell = sum(share_of(name) * args.seconds + OVERHEAD for _, name in phases(names, args.rounds))
    probes = 0.0 if args.rates else CAPACITY_WARMUP + CAPACITY_SECONDS + OVERHEAD
    return START + START_VLLM * len({*names} & {*VLLM_BESIDE_PEFT}) + len(args.traces) * (probes + len(args.loads) * cell)


def share_of(contestant: str) -> float:
    return EVERY_ROUND.get(contestant, FIRST_ROUND)


def rates(setting: Setting, ours: Ours, trace: Trace) -> tuple[float | None, dict[str, float]]:
    """The capacity for this trace (None: not measured), and requests per second by load."""
    names = setting.args.loads
    if setting.args.rates:
        return None, dict(zip(names, setting.args.rates, strict=True))
    seconds = CAPACITY_WARMUP + CAPACITY_SECONDS
    load = setting.load(trace, 0, CAPACITY_REQUESTS / seconds, seconds)
    found = capacity(ours, load, CAPACITY_CONCURRENCY, CAPACITY_WARMUP)
    log(f"{trace.name}: {found:.2f} requests/s at concurrency {CAPACITY_CONCURRENCY}")
    return found, {name: LOADS[name] * found for name in names}


def phases(contestants: Iterable[str], rounds: int) -> list[tuple[int, str]]:
    """(round, contestant) in the order of measuring: contestants take turns within a round."""
    return [(turn, name) for turn in range(rounds) for name in contestants if turn == 0 or name in EVERY_ROUND]


def keep_log(setting: Setting, contestant: str) -> Path:
    """Where the log of a contestant's server that failed will still be when this run is over."""
    name = contestant if contestant in VLLM_BESIDE_PEFT else OURS
    kept = QUICK_RESULTS / f"coserve-{name}.log"
    kept.parent.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):
        shutil.copy(setting.folder / f"{name}.log", kept)
    return kept


def measure_cell(
    setting: Setting, contestants: Mapping[str, Run], trace: Trace, load: str, rate: float, start: int, progress: Callable[[str], None]
) -> list[Sample]:
    """Every contestant with the same requests in a round, or with the first of them; each round takes the next ones of the trace. One
    that fails (its server is gone) is left out of that round, and said so."""
    args, found = setting.args, []
    per_round = max(1, round(rate * args.seconds))
    for turn, name in phases(contestants, args.rounds):
        progress(f"{trace.name} {load}, round {turn + 1}: {name}")
        offered = setting.load(trace, start + turn * per_round, rate, args.seconds).first(share_of(name) * args.seconds)
        try:
            phase = contestants[name](Load([], [], offered.seconds) if name == "finetune" else offered)
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            log(f"{trace.name} {load} {turn + 1} {name}: left out, {error!r}; its log is in {keep_log(setting, name)}")
            continue
        found.append(Sample(trace.name, load, name, turn, phase))
        failed = sum(not r.ok for r in phase.records)
        log(
            f"{trace.name} {load} {turn + 1} {name}: {phase.finetune_tok_s:.0f} finetuning tok/s, {len(phase.records)} requests"
            + (f", {failed} failed" if failed else "")
            + ("" if phase.busy_seconds is None else f", busy {phase.busy_seconds / phase.elapsed:.0%}")
            + f" of {phase.elapsed:.1f} s"
        )
    return found


def measure(setting: Setting, ours: Ours, slos: Slos, contestants: Mapping[str, Run], fields: dict[str, Any]) -> list[Sample]:
    """All cells, into `fields` and into the result file as they come. Returns the samples."""
    args = setting.args
    samples: list[Sample] = []
    cells: list[dict[str, Any]] = []
    by_trace = {trace.name: rates(setting, ours, trace) for trace in setting.traces}
    total = len(by_trace) * len(args.loads) * len(phases(contestants, args.rounds))
    with shown(total) as progress:
        for trace in setting.traces:
            capacity_req_s, by_load = by_trace[trace.name]
            start = CAPACITY_REQUESTS
            for load, rate in by_load.items():
                measured = measure_cell(setting, contestants, trace, load, rate, start, progress)
                start += args.rounds * max(1, round(rate * args.seconds))
                samples += measured
                where = {"trace": trace.name, "load": load, "rate": rate, "capacity_req_s": capacity_req_s}
                cells.append({**where, **cell_figures(measured, slos, fields["row_seconds"])})
                fields |= grid_figures(cells, samples, slos)
                write("coserve", args, fields, [s.as_dict() for s in samples])
    return samples


# -------------------------------------------------------------------------------------------------------------- showing
@contextlib.contextmanager
def shown(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives is called before each phase with what it is."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task: TaskID = bar.add_task("", total=total)
        begun = -1

        def begin(description: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=description, completed=begun)

        yield begin
        bar.update(task, completed=total)


def show(cells: list[dict[str, Any]]) -> None:
    columns = ("trace", "load", "req/s", "contestant", "tok/s", "loose", "mid", "strict", "TTFT p99", "TPOT p99")
    table = Table(title="finetuning tok/s, share of requests within each SLO, milliseconds")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for cell in cells:
        for name, c in cell["contestants"].items():
            shares = ["" if c["attainment"][slo] is None else f"{c['attainment'][slo]:.0%}" for slo in ("loose", "mid", "strict")]
            latencies = ["" if c[key] is None else f"{c[key]:.0f}" for key in ("p99_ttft_ms", "p99_tpot_ms")]
            table.add_row(cell["trace"], cell["load"], f"{cell['rate']:.2f}", name, f"{c['finetune_tok_s']:.0f}", *shares, *latencies)
        table.add_section()
    Console(stderr=True, width=max(Console(stderr=True).width, 110)).print(table)


def options() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--traces", nargs="+", choices=list(TRACES), help="default: all of them, azure-conv with --quick")
    found.add_argument("--loads", nargs="+", choices=list(LOADS), help="default: all of them, mid with --quick")
    found.add_argument("--contestants", nargs="+", metavar="NAME", help="only these (default: all of README.md's table)")
    found.add_argument("--rates", nargs="+", type=float, metavar="R", help="requests/s of each load, instead of shares of the capacity")
    found.add_argument("--seconds", type=float, help="of arrivals in a phase (default: 6)")
    found.add_argument("--rounds", type=int, help="default: 2, with --quick 1")
    found.add_argument("--temporal", nargs="*", type=int, metavar="N", help="of temporal sharing, 0: dynamic (default: 64 128 512 0)")
    found.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="also measure vLLM beside PEFT, with this vLLM")
    args = found.parse_args()
    args.traces = args.traces or (["azure-conv"] if args.quick else list(TRACES))
    args.loads = args.loads or (["mid"] if args.quick else list(LOADS))
    args.cores = sorted(os.sched_getaffinity(0))
    args.seconds = args.seconds or 6.0
    args.rounds = args.rounds or (1 if args.quick else 2)
    args.temporal = args.temporal if args.temporal is not None else ([128] if args.quick else [64, 128, 512, 0])
    if args.rates and len(args.rates) != len(args.loads):
        found.error(f"--rates needs one rate for each of the loads {', '.join(args.loads)}")
    known = all_contestants(args)
    if unknown := [n for n in args.contestants or () if n not in known]:
        found.error(f"--contestants: no {unknown[0]!r}; there are {', '.join(known)}")
    return args


def main() -> None:
    args = options()
    log(f"about {estimated_seconds(args) / 60:.0f} minutes")
    model = resolve_model(args.model)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vocab_size = ModelConfig.from_hf(model).vocab_size
        flags = ("--state-dir", str(folder / OURS), "--dtype", DTYPE, *MEMORY)
        server = stack.enter_context(flexllm_server(model, folder / f"{OURS}.log", *flags, threads=args.threads))
        processes = {OURS: server.process.pid}
        ours = Ours(server, folder, args.seed)
        ours.set({"mode": "inference"})
        step = decode_step_seconds(server, vocab_size, args.seed)
        row = row_seconds(server, vocab_size, args.seed)
        h = step / REFERENCE_STEP
        slos = slos_here(h)
        log(f"decode step at batch 8: {1e3 * step:.1f} ms; objectives (TTFT s, TPOT s): {slos}; a row: {1e3 * row:.2f} ms")
        traces = [Trace.named(name, common.TRACES, args.seed, shorter_here(h)) for name in args.traces]
        for trace in traces:
            log(f"{trace.name}: {trace.source}")
        setting = Setting(args, model, vocab_size, traces, folder)
        stack.enter_context(freezer(server))
        names = contestant_names(args)
        by_name = run_ours(ours, slos, names)
        if peers := [name for name in names if name in VLLM_BESIDE_PEFT]:
            by_name |= start_vllm_beside_peft(stack, setting, peers, processes)
        contestants = {name: by_name[name] for name in names}
        ours.run(scheduler_settings("coserve-loose", slos), setting.warmup)
        for name in peers:
            contestants[name](setting.warmup)
        fields: dict[str, Any] = {
            "h": h,
            "decode_step_ms": 1e3 * step,
            "row_seconds": row,
            "slos": {name: {"ttft_s": ttft, "tpot_s": tpot} for name, (ttft, tpot) in slos.items()},
            "split_attains_from": ATTAINED,
            "traces": {trace.name: trace.source for trace in traces},
            "rounds": args.rounds,
            "phase_seconds": {name: share_of(name) * args.seconds for name in names},
            "patience_s": PATIENCE,
        }
        samples = measure(setting, ours, slos, contestants, fields)
        fields["memory_gb"] = {name: memory_bytes(pid) / 1e9 for name, pid in processes.items()}
        log("memory, GB: " + ", ".join(f"{name} {gb:.1f}" for name, gb in fields["memory_gb"].items()))
    show(fields["cells"])
    finish("coserve", args, fields, [s.as_dict() for s in samples])


if __name__ == "__main__":
    main()
