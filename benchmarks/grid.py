"""The figures of coserve.py from what was measured: one cell (a trace at a load), several of them, all. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client import RequestRecord, raw, summarize

LOADS = {"light": 0.2, "mid": 0.4, "heavy": 0.6}  # of the capacity
SLOS = {"loose": (5.0, 0.045), "mid": (0.4, 0.120), "strict": (0.5, 0.050)}  # TTFT s, TPOT s on the reference machine
REFERENCE_STEP = 0.013  # seconds of a decode step at batch 8, 8B model on an A100
SPLITS = {"split": 0.5, "split-25": 0.25, "split-75": 0.75}  # share of the machine that trains
ATTAINED = {"loose": 0.99, "mid": 0.95, "strict": 0.95}  # share of requests from which a load counts as served

Slos = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Phase:
    """What one contestant did with one load."""

    records: list[RequestRecord]
    seconds: float  # of arrivals
    elapsed: float  # until the last answer, and no less
    finetune_tok_s: float  # tokens over `elapsed`, half of each for its forward, half for its backward
    busy_seconds: float | None  # that the engine spent in iterations; None: not known


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
        figures = {name: getattr(self.phase, name) for name in ("seconds", "elapsed", "finetune_tok_s", "busy_seconds")}
        return {**where, **figures, "requests": raw(self.phase.records)}


def slos_here(h: float) -> dict[str, tuple[float, float]]:
    """TTFT and TPOT objectives in seconds on a machine whose decode step is `h` times the reference's."""
    return {name: (ttft, tpot * h) for name, (ttft, tpot) in SLOS.items()}


def own_slo(contestant: str) -> str:
    mode, _, slo = contestant.rpartition("-")
    return slo if mode in ("coserve", "inference") else "loose"


# ------------------------------------------------------------------------------------------------------- one contestant
def attainment(records: Sequence[RequestRecord], slo: tuple[float, float]) -> float | None:
    """Share of requests that met both objectives; a failed one met neither. None when there were no requests."""
    return sum(r.attains(*slo) for r in records) / len(records) if records else None


def contestant_figures(name: str, phases: Sequence[Phase], slos: Slos) -> dict[str, Any]:
    """Rounds pooled. Goodput is by the objectives that the contestant was told."""
    records = [r for p in phases for r in p.records]
    elapsed = sum(p.elapsed for p in phases)
    known = [p.busy_seconds / p.elapsed for p in phases if p.busy_seconds is not None]
    own = slos[own_slo(name)]
    return {
        **summarize(records, *own),
        "finetune_tok_s": statistics.median(p.finetune_tok_s for p in phases),
        "busy": statistics.median(known) if known else None,
        "output_tok_s": sum(len(r.token_times) for r in records) / elapsed,
        "goodput_req_s": sum(r.attains(*own) for r in records) / elapsed,
        "attainment": {slo: attainment(records, limits) for slo, limits in slos.items()},
        "rounds": len(phases),
        "seconds": sum(p.seconds for p in phases),
        "elapsed": elapsed,
    }


# --------------------------------------------------------------------------------------------------------------- a cell
def cell_figures(samples: Sequence[Sample], slos: Slos, row_seconds: float) -> dict[str, Any]:
    """Figures of the samples of one trace and load; ratios are medians of the ratios within a round.

    Co-serving and requests alone answered the same requests in full. So `idle_share`, by SLO, is what requests alone leave of the time that
    co-serving took, and `leftover_efficiency` what co-serving trained over what the machine trains by itself in that rest.

    `traded`, by SLO, counts the requests that both answered, and of these the ones that met it with co-serving alone (won) or without it
    alone (lost): the same requests, so that chance has a part in nothing else of the difference between their attainments.

    `bound_tok_s` is what training could reach if every row of a request rode along in a training pass for `row_seconds`, the price of
    its row alone, and nothing else cost anything: dedicated tok/s x (1 - row_seconds x the rows computed per second).

    The split that co-serving is held against is, by SLO, the best one: `best_split`.
    """
    names = dict.fromkeys(s.contestant for s in samples)
    contestants = {n: contestant_figures(n, [s.phase for s in samples if s.contestant == n], slos) for n in names}
    by_round: dict[str, dict[int, Phase]] = {n: {s.round: s.phase for s in samples if s.contestant == n} for n in names}

    def paired(figure: Callable[..., float | None], *of: str) -> float | None:
        """The median of `figure` over the rounds that all of the contestants took part in."""
        rounds = [by_round.get(name, {}) for name in of]
        return median(figure(*(r[i] for r in rounds)) for i in rounds[0] if all(i in r for r in rounds))

    def left(both: Phase) -> float:
        return max(0.0, 1 - row_seconds * rows_per_second(both))

    def by_slo(figure: Callable[..., float | None], *of: str) -> dict[str, float | None]:
        """`figure` of co-serving under each SLO and of others, whose names may depend on it."""
        return {slo: paired(figure, f"coserve-{slo}", *(name.format(slo=slo, split=split[slo]) for name in of)) for slo in slos}

    def traded(slo: str) -> dict[str, int]:
        mine, alone = by_round.get(f"coserve-{slo}", {}), by_round.get(f"inference-{slo}", {})
        pairs = [pair for i in mine.keys() & alone.keys() for pair in zip(mine[i].records, alone[i].records, strict=True)]
        met = Counter((both.attains(*slos[slo]), requests.attains(*slos[slo])) for both, requests in pairs)
        return {"requests": len(pairs), "won": met[True, False], "lost": met[False, True]}

    split = {slo: best_split(contestants, slo) for slo in slos}
    alone = "inference-{slo}"
    return {
        "contestants": contestants,
        "traded": {slo: traded(slo) for slo in slos},
        "idle_share": by_slo(_idle, alone),
        "leftover_efficiency": by_slo(
            lambda both, job, requests: _ratio(_speed_ratio(both, job), _idle(both, requests)), "finetune", alone
        ),
        "speedup_vs_split": by_slo(_speed_ratio, "{split}"),
        "best_split": split,
        "split_attains": {slo: name is not None and _attains(contestants[name]["attainment"][slo], slo) for slo, name in split.items()},
        "bound_tok_s": by_slo(lambda both, job: job.finetune_tok_s * left(both), "finetune"),
        "bound_share": by_slo(lambda both, job: _ratio(_speed_ratio(both, job), left(both)), "finetune"),
        "bound_vs_split": by_slo(
            lambda both, job, split: _ratio(job.finetune_tok_s * left(both), split.finetune_tok_s), "finetune", "{split}"
        ),
        "bound_leftover": by_slo(lambda both, requests: _ratio(left(both), _idle(both, requests)), alone),
        "finetune_share": by_slo(_speed_ratio, "finetune"),
    }


def best_split(contestants: Mapping[str, Mapping[str, Any]], slo: str) -> str | None:
    """The split that trains most of those that attain the SLO, or of all if none does; None without any."""
    found = [name for name in SPLITS if name in contestants]
    attaining = [name for name in found if _attains(contestants[name]["attainment"][slo], slo)]
    return max(attaining or found, key=lambda name: contestants[name]["finetune_tok_s"], default=None)


def rows_per_second(phase: Phase) -> float:
    """Rows of requests that were computed: prompts that had a first token, and a row for each token after it."""
    return sum(r.prompt_tokens + len(r.token_times) - 1 for r in phase.records if r.token_times) / phase.elapsed


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _idle(both: Phase, inference: Phase) -> float | None:
    return None if inference.busy_seconds is None else max(0.0, 1 - inference.busy_seconds / both.elapsed)


def _speed_ratio(one: Phase, other: Phase) -> float | None:
    return _ratio(one.finetune_tok_s, other.finetune_tok_s)


def _attains(share: float | None, slo: str) -> bool:
    return share is not None and share >= ATTAINED[slo]


def median(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None when there are none."""
    found = [v for v in values if v is not None]
    return statistics.median(found) if found else None


def difference(traded: Iterable[Mapping[str, int]]) -> tuple[float, float] | None:
    """Attainment of co-serving less that of requests alone, and half the width of its 95 % interval; None without requests.

    Agresti and Min 2005 (Statistics in Medicine 24): half a request is added to each way in which a pair can end.
    """
    counts = [(t["requests"], t["won"], t["lost"]) for t in traded]
    n, won, lost = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    if not n:
        return None
    total, apart = n + 2, (won - lost) / (n + 2)
    return (won - lost) / n, 1.96 * math.sqrt((won + lost + 1) / total - apart**2) / math.sqrt(total)


# ------------------------------------------------------------------------------------------------------------ all cells
def _pooled(samples: Iterable[Sample], contestant: str) -> list[RequestRecord]:
    return [r for s in samples if s.contestant == contestant for r in s.phase.records]


def load_figures(cells: Sequence[Mapping[str, Any]], samples: Sequence[Sample], slos: Slos) -> dict[str, Any]:
    """By SLO, over all traces at one load: requests pooled, ratios as medians over the cells."""
    return {
        slo: {
            "attainment": attainment(_pooled(samples, f"coserve-{slo}"), limits),
            "attainment_inference_only": attainment(_pooled(samples, f"inference-{slo}"), limits),
            "attainment_difference_95": difference(c["traded"][slo] for c in cells),
            "leftover_efficiency": median(c["leftover_efficiency"][slo] for c in cells),
            "bound_share": median(c["bound_share"][slo] for c in cells),
            "speedup_vs_split": median(c["speedup_vs_split"][slo] for c in cells),
            "split_attains": any(_attains(attainment(_pooled(samples, split), limits), slo) for split in SPLITS),
        }
        for slo, limits in slos.items()
    }


def grid_figures(cells: Sequence[Mapping[str, Any]], samples: Sequence[Sample], slos: Slos) -> dict[str, Any]:
    """All cells. The figures at the top are those of the loose objectives (None where those have not been run)."""
    records = _pooled(samples, "coserve-loose")
    pooled = summarize(records, *slos["loose"])
    by_load = {
        load: load_figures([c for c in cells if c["load"] == load], [s for s in samples if s.load == load], slos)
        for load in dict.fromkeys(c["load"] for c in cells)
    }
    return {
        "attainment": attainment(records, slos["loose"]),
        "attainment_inference_only": attainment(_pooled(samples, "inference-loose"), slos["loose"]),
        "finetune_tok_s": median(c["contestants"].get("coserve-loose", {}).get("finetune_tok_s") for c in cells),
        "finetune_share": median(c["finetune_share"]["loose"] for c in cells),
        "leftover_efficiency": median(c["leftover_efficiency"]["loose"] for c in cells),
        "bound_share": median(c["bound_share"]["loose"] for c in cells),
        "speedup_vs_best_split": median(c["speedup_vs_split"]["loose"] for c in cells),
        "p99_tpot_ms": pooled["p99_tpot_ms"],
        "max_gap_ms": pooled["max_gap_ms"],
        "by_load": by_load,
        "cells": list(cells),
    }
