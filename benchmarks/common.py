"""What every benchmark shares: its options, the record of where and how it ran, paired timing, and its result as one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flexllm.config import shorten_spinning

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # committed: full runs only
QUICK_RESULTS = ROOT / "out"
TRACES = ROOT.parent / "shared" / "data" / "traces"  # recorded traces, where there are any
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "numba")


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer and shorter samples (under 2 minutes), the same fields")
    options.add_argument(
        "--out", type=Path, metavar="FILE", help="result file (default: <name>.json in benchmarks/results, with --quick in out)"
    )
    options.add_argument("--model", help="a folder, a .gguf file or a hub id (default: the engine's default model)")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every contestant")
    options.add_argument("--seed", type=int, default=0)
    return options


def spin_as_the_server() -> None:
    """Start this process again with OpenMP threads that sleep when idle, as the server's do: once torch is loaded it is too late."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        shorten_spinning()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def finish(name: str, args: argparse.Namespace, fields: Mapping[str, Any], samples: Any) -> None:
    """Write the result file and print the same object as the last line of stdout."""
    result, out = write(name, args, fields, samples)
    log(f"wrote {out} after {time.monotonic() - STARTED:.0f} s")
    print(json.dumps(result), flush=True)


def write(name: str, args: argparse.Namespace, fields: Mapping[str, Any], samples: Any) -> tuple[dict[str, Any], Path]:
    """Write the result file, over an earlier one: what a long benchmark has so far is there when it is cut short."""
    result = {
        "benchmark": name,
        **fields,
        "quick": args.quick,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *map(_as_recorded, sys.argv)]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "samples": samples,
    }
    result = _rounded(result)
    out = args.out or (QUICK_RESULTS if args.quick else RESULTS) / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result, out


def _as_recorded(argument: str) -> str:
    """Without the folders of this machine."""
    path = Path(argument)
    return "PYTHON" if path.name.startswith("python") else path.name if path.is_absolute() else argument


def log(message: str) -> None:
    """Progress for whoever watches; stdout is left to the result."""
    print(message, file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


# ------------------------------------------------------------------------------------------------------- where it ran
def machine() -> dict[str, Any]:
    info: dict[str, Any] = {"os": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()}
    info["isa"], info["dtype"] = ISA, DTYPE
    info["memory_gb"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)), "")


ISA = [flag for flag in _cpuinfo("flags").split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
# Of every contestant, as the engine would choose: where a CPU has no arithmetic for bf16, it is emulated and no match for fp32. (Not asked
# of the engine: torch is loaded after `spin_as_the_server`.)
DTYPE = "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(ISA) else "float32"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source, with `-dirty` when src or benchmarks hold changes of their own."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "src", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


# ------------------------------------------------------------------------------------------------------- paired timing
@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ratios of neighbouring samples, with their quartiles."""

    median: float
    q25: float
    q75: float
    pairs: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Samples of each contestant, taken in turns (A B A B ...), so that the machine's drift falls on all of them alike.

    A contestant is a function that runs once and returns what it measured. The first `warmup` rounds are thrown away.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warmup, rounds):
        for name, run in contestants.items():
            value = run()
            if turn >= 0:
                samples[name].append(value)
    return samples


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of samples that were taken side by side. Raises ValueError unless there are as many of both, and some."""
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"paired samples must be as many on both sides, got {len(numerators)} and {len(denominators)}")
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    q25, median, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, q25, q75, len(ratios))
