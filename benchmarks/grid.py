"""The figures of coserve.py from what was measured: one cell (a trace at a load), several of them, all. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client import RequestRecord, raw, summarize

LOADS = {"light": 0.2, "mid": 0.4, "heavy": 0.6}  # of the capacity
SLOS = {"loose": (5.0, 0.045), "mid": (0.4, 0.120), "strict": (0.5, 0.050)}  # TTFT s, TPOT s on the reference machine
REFERENCE_STEP = 0.013  # seconds of a decode step at batch 8, 8B model on an A100
ATTAINED = {"loose": 0.99, "mid": 0.95, "strict": 0.95}  # share of requests from which a load counts as served

Slos = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Phase:
    """What one contestant did with one load."""

    records: list[RequestRecord]
    seconds: float  # of arrivals, over which finetuning and busy time count
    finetune_tok_s: float  # tokens whose backward is done
    busy: float | None  # share of the time that the engine spent in iterations; None: not known


@dataclass(frozen=True)
class Sample:
    """A phase and where it belongs. Phases of one trace, load and round saw the same requests, or the first of them."""

    trace: str
    load: str
    contestant: str
    round: int
    phase: Phase

    def as_dict(self) -> dict[str, Any]:
        where = {"trace": self.trace, "load": self.load, "contestant": self.contestant, "round": self.round}
        figures = {"seconds": self.phase.seconds, "finetune_tok_s": self.phase.finetune_tok_s, "busy": self.phase.busy}
        return {**where, **figures, "requests": raw(self.phase.records)}


def slos_here(h: float) -> dict[str, tuple[float, float]]:
    """TTFT and TPOT objectives in seconds on a machine whose decode step is `h` times the reference's."""
    return {name: (ttft, tpot * h) for name, (ttft, tpot) in SLOS.items()}


def own_slo(contestant: str) -> str:
    name = contestant.rpartition("-")[2]
    return name if contestant.startswith("coserve-") else "loose"


# ------------------------------------------------------------------------------------------------------- one contestant
def attainment(records: Sequence[RequestRecord], slo: tuple[float, float]) -> float | None:
    """Share of requests that met both objectives; a failed one met neither. None when there were no requests."""
    return sum(r.attains(*slo) for r in records) / len(records) if records else None


def contestant_figures(name: str, phases: Sequence[Phase], slos: Slos) -> dict[str, Any]:
    """Rounds pooled. Goodput is by the objectives that the contestant was told; rates count what came within the phases."""
    records = [r for p in phases for r in p.records]
    seconds = sum(p.seconds for p in phases)
    known = [p.busy for p in phases if p.busy is not None]
    in_time = sum(t < p.seconds for p in phases for r in p.records for t in r.token_times)
    own = slos[own_slo(name)]
    return {
        **summarize(records, *own),
        "finetune_tok_s": statistics.median(p.finetune_tok_s for p in phases),
        "busy": statistics.median(known) if known else None,
        "output_tok_s": in_time / seconds,
        "goodput_req_s": sum(r.attains(*own) for r in records) / seconds,
        "attainment": {slo: attainment(records, limits) for slo, limits in slos.items()},
        "rounds": len(phases),
        "seconds": seconds,
    }


# --------------------------------------------------------------------------------------------------------------- a cell
def cell_figures(samples: Sequence[Sample], slos: Slos, row_seconds: float) -> dict[str, Any]:
    """Figures of the samples of one trace and load; ratios are medians of the ratios within a round.

    `bound_tok_s` is what training could reach if every row of a request rode along in a training pass for `row_seconds`, the price of
    its row alone, and nothing else cost anything: dedicated tok/s x (1 - row_seconds x the rows computed per second).
    """
    names = dict.fromkeys(s.contestant for s in samples)
    contestants = {n: contestant_figures(n, [s.phase for s in samples if s.contestant == n], slos) for n in names}
    by_round: dict[str, dict[int, Phase]] = {n: {s.round: s.phase for s in samples if s.contestant == n} for n in names}

    def paired(figure: Callable[..., float | None], *of: str) -> float | None:
        """The median of `figure` over the rounds that all of the contestants took part in."""
        rounds = [by_round.get(name, {}) for name in of]
        return median(figure(*(r[i] for r in rounds)) for i in rounds[0] if all(i in r for r in rounds))

    def left(inference: Phase) -> float:
        return max(0.0, 1 - row_seconds * rows_per_second(inference))

    split = contestants.get("split")
    return {
        "contestants": contestants,
        "idle_share": paired(_idle, "inference"),
        "leftover_efficiency": {slo: paired(_leftover, *_three(slo)) for slo in slos},
        "speedup_vs_split": {slo: paired(_speed_ratio, f"coserve-{slo}", "split") for slo in slos},
        "split_attains": {slo: split is not None and _attains(split["attainment"][slo], slo) for slo in slos},
        "bound_tok_s": paired(lambda alone, requests: alone.finetune_tok_s * left(requests), "finetune", "inference"),
        "bound_share": {
            slo: paired(lambda both, alone, requests: _ratio(_speed_ratio(both, alone), left(requests)), *_three(slo)) for slo in slos
        },
        "bound_vs_split": paired(
            lambda alone, requests, split: _ratio(alone.finetune_tok_s * left(requests), split.finetune_tok_s),
            *("finetune", "inference", "split"),
        ),
        "bound_leftover": paired(lambda requests: _ratio(left(requests), _idle(requests)), "inference"),
        "finetune_share": {slo: paired(_speed_ratio, f"coserve-{slo}", "finetune") for slo in slos},
    }


def _three(slo: str) -> tuple[str, str, str]:
    return f"coserve-{slo}", "finetune", "inference"


def rows_per_second(phase: Phase) -> float:
    """Rows of requests that were computed within the phase: prompts that had a first token, and a row for each token after it."""
    inside = [(r.prompt_tokens, [t for t in r.token_times if t < phase.seconds]) for r in phase.records]
    return sum(prompt + len(times) - 1 for prompt, times in inside if times) / phase.seconds


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _idle(inference: Phase) -> float | None:
    return None if inference.busy is None else 1 - inference.busy


def _speed_ratio(one: Phase, other: Phase) -> float | None:
    return _ratio(one.finetune_tok_s, other.finetune_tok_s)


def _leftover(both: Phase, dedicated: Phase, inference: Phase) -> float | None:
    """The share of the dedicated speed over the share of time that requests alone leave idle; perfect time slicing is 1."""
    return _ratio(_speed_ratio(both, dedicated), _idle(inference))


def _attains(share: float | None, slo: str) -> bool:
    return share is not None and share >= ATTAINED[slo]


def median(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None when there are none."""
    found = [v for v in values if v is not None]
    return statistics.median(found) if found else None


# ------------------------------------------------------------------------------------------------------------ all cells
def _pooled(samples: Iterable[Sample], contestant: str) -> list[RequestRecord]:
    return [r for s in samples if s.contestant == contestant for r in s.phase.records]


def load_figures(cells: Sequence[Mapping[str, Any]], samples: Sequence[Sample], slos: Slos) -> dict[str, Any]:
    """By SLO, over all traces at one load: requests pooled, ratios as medians over the cells."""
    return {
        slo: {
            "attainment": attainment(_pooled(samples, f"coserve-{slo}"), limits),
            "attainment_inference_only": attainment(_pooled(samples, "inference"), limits),
            "leftover_efficiency": median(c["leftover_efficiency"][slo] for c in cells),
            "bound_share": median(c["bound_share"][slo] for c in cells),
            "speedup_vs_split": median(c["speedup_vs_split"][slo] for c in cells),
            "split_attains": _attains(attainment(_pooled(samples, "split"), limits), slo),
        }
        for slo, limits in slos.items()
    }


def grid_figures(cells: Sequence[Mapping[str, Any]], samples: Sequence[Sample], slos: Slos) -> dict[str, Any]:
    """All cells. The figures at the top are those of the loose objectives."""
    records = _pooled(samples, "coserve-loose")
    pooled = contestant_figures("coserve-loose", [s.phase for s in samples if s.contestant == "coserve-loose"], slos)
    by_load = {
        load: load_figures([c for c in cells if c["load"] == load], [s for s in samples if s.load == load], slos)
        for load in dict.fromkeys(c["load"] for c in cells)
    }
    return {
        "attainment": attainment(records, slos["loose"]),
        "attainment_inference_only": attainment(_pooled(samples, "inference"), slos["loose"]),
        "finetune_tok_s": median(c["contestants"]["coserve-loose"]["finetune_tok_s"] for c in cells),
        "finetune_share": median(c["finetune_share"]["loose"] for c in cells),
        "leftover_efficiency": median(c["leftover_efficiency"]["loose"] for c in cells),
        "bound_share": median(c["bound_share"]["loose"] for c in cells),
        "speedup_vs_best_split": median(c["speedup_vs_split"]["loose"] for c in cells),
        "p99_tpot_ms": pooled["p99_tpot_ms"],
        "max_gap_ms": pooled["max_gap_ms"],
        "by_load": by_load,
        "cells": list(cells),
    }
