"""What the report says about each benchmark: tables of figures beside their bounds and targets, and pictures (report_plots.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

import report_coserve_plots as coserve_plots
import report_plots as plots
from grid import SPLITS, difference
from report_blocks import Cell, Picture, Section, Table, at_least, megabytes, number, percent, times

Result = Mapping[str, Any]

WITHIN = 0.01  # attainment may fall so far below that of requests alone
FLOORS = {"loose": 0.99, "strict": 0.95}  # wherever requests alone reach it
SPEEDUPS = {"heavy": 1.9, "light": 2.5}  # over the best split that attains the same SLO
LEFTOVER = 1.0
SLO_ORDER = ("loose", "mid", "strict")
BASELINES = ("temporal-64", "temporal-128", "temporal-512", "temporal-dynamic", *SPLITS, "contending")


# ------------------------------------------------------------------------------------------------------------- co-serving
def coserve(result: Result) -> Section:
    title = "Co-serving: what requests get, and what training gets"
    cells = result["cells"]
    objectives = ", ".join(
        f"{name} TTFT {number(slo['ttft_s'])} s and TPOT {1e3 * slo['tpot_s']:.0f} ms" for name, slo in result.get("slos", {}).items()
    )
    says = (
        f"Requests attain their SLO if both objectives hold for them: {objectives} (TPOT scaled by h = {number(result.get('h'))}, this "
        f"machine's decode step at batch 8, {number(result.get('decode_step_ms'))} ms, over the reference machine's). Targets: attainment "
        "with training within 1 point of requests alone, and at least 99 % (loose) or 95 % (strict) wherever requests alone reach that; "
        "leftover efficiency at least 1, which is perfect time slicing; speedup over the split machine at least 1.9 (heavy) or 2.5 "
        "(light). The bound is the training speed without requests times the share of time that their rows leave, if each took only the "
        f"{1e3 * result['row_seconds']:.2f} ms that it takes as one of many in a long prompt, and nothing else cost anything. A target "
        "beyond the bound is forbidden by it: such a figure is not marked as met or missed."
    )
    tables: list[Table | Picture] = [table for slo in _slos(cells) for table in (_attainment(cells, slo), _training(cells, slo))]
    pictures = [
        Picture(
            "coserve_attainment",
            "Attainment of the requests by load: co-serving should lie on requests alone.",
            coserve_plots.attainment(cells),
        ),
        Picture(
            "coserve_finetuning",
            "Finetuning speed by load; grey, the bound; dotted, what the machine trains without requests.",
            coserve_plots.finetuning(cells),
        ),
    ]
    for metric in ("ttft", "tpot"):
        if result.get("samples"):
            caption = f"{metric.upper()} of all requests. Left is better; dotted lines are the objectives."
            pictures.append(Picture(f"coserve_{metric}", caption, coserve_plots.cdf(result, metric)))
    return Section(title, says, [*tables, *pictures])


def _slos(cells: list[Result]) -> list[str]:
    named = {slo for cell in cells for slo in cell.get("leftover_efficiency", {})}
    return [slo for slo in SLO_ORDER if slo in named]


def attains(slo: str, alone: float | None, coserved: float | None) -> bool | None:
    """Whether co-serving keeps to its target; None without both figures."""
    if alone is None or coserved is None:
        return None
    floor = FLOORS.get(slo, 0.0)
    return coserved >= alone - WITHIN and (alone < floor or coserved >= floor)


def _attainment(cells: list[Result], slo: str) -> Table:
    """A row for each cell, then for all traces at each load, then for all cells: a few requests say little."""
    mine, alone = f"coserve-{slo}", f"inference-{slo}"
    groups = [(f"{c['trace']}, {c['load']}", number(c["rate"]), [c]) for c in cells]
    if len({c["trace"] for c in cells}) > 1:
        groups += [(f"all traces, {load}", "", [c for c in cells if c["load"] == load]) for load in dict.fromkeys(c["load"] for c in cells)]
        groups.append(("all", "", cells))
    baselines = _baselines(cells)
    rows: list[list[str | Cell]] = []
    for label, rate, together in groups:
        shares = {name: _attained(together, name, slo) for name in (alone, mine, *baselines)}
        rows.append(
            [
                label,
                rate,
                " / ".join(_requests(together, names) for names in ([alone], [mine], baselines)),
                percent(shares[alone]),
                Cell(percent(shares[mine]), attains(slo, shares[alone], shares[mine])),
                _difference(together, slo),
                *(percent(shares[name]) for name in baselines),
            ]
        )
    headings = ["trace, load", "req/s", "requests", "alone", "coserve", "difference, points", *baselines]
    note = (
        "alone: requests without training. requests: how many each was judged by, alone / coserve / the baseline with the fewest, "
        "which had the first of the same requests. difference: coserve less alone, with its 95 % interval as the same requests met their "
        "SLO or not with either; an interval wider than the point that is allowed says that there were too few of them to tell."
    )
    return Table(headings, rows, f"{slo}: attainment", note)


def _baselines(cells: list[Result]) -> list[str]:
    return [name for name in BASELINES if any(name in c["contestants"] for c in cells)]


def _attained(cells: list[Result], name: str, slo: str) -> float | None:
    """The share of a contestant's requests in these cells; None where it took no part."""
    found = [c["contestants"][name] for c in cells if name in c["contestants"]]
    judged = [(c["requests"], c["attainment"][slo]) for c in found if c["attainment"][slo] is not None]
    return sum(n * share for n, share in judged) / sum(n for n, _ in judged) if judged else None


def _difference(cells: list[Result], slo: str) -> str:
    """In points; nothing for results that did not count what was won and lost."""
    found = difference(c["traded"][slo] for c in cells if "traded" in c)
    return "–" if found is None else f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f}"


def _requests(cells: list[Result], names: Iterable[str]) -> str:
    """The fewest that any of them had."""
    found = [c["contestants"] for c in cells]
    return number(
        min((sum(c[name]["requests"] for c in found if name in c) for name in names if any(name in c for c in found)), default=None)
    )


def _training(cells: list[Result], slo: str) -> Table:
    baselines = _baselines(cells)
    rows: list[list[str | Cell]] = []
    for cell in cells:
        speeds = {name: number(c["finetune_tok_s"]) for name, c in cell["contestants"].items()}
        rows.append(
            [
                f"{cell['trace']}, {cell['load']}",
                speeds.get(f"coserve-{slo}", "–"),
                *(speeds.get(name, "–") for name in baselines),
                speeds.get("finetune", "–"),
                number(cell["bound_tok_s"].get(slo)),
                percent(cell["bound_share"].get(slo)),
                _leftover(cell, slo),
                _speedup(cell, slo),
            ]
        )
    headings = [
        "trace, load",
        "coserve",
        *baselines,
        "no requests",
        "bound",
        "coserve, of bound",
        f"leftover eff. (≥ {LEFTOVER:g})",
        "vs split",
    ]
    return Table(headings, rows, f"{slo}: finetuning tok/s")


def _bounded(value: float | None, target: float, bound: float | None, write: Callable[[float | None], str]) -> Cell:
    """Held to its target, unless the bound lies below that; then the bound stands there."""
    if bound is None:
        return at_least(value, target, write)
    return Cell(f"{write(value)}, bound {write(bound)}", None if value is None or bound < target else value >= target)


def _leftover(cell: Result, slo: str) -> Cell:
    """Held to its target where requests alone attain the SLO."""
    found = _bounded(cell["leftover_efficiency"].get(slo), LEFTOVER, cell["bound_leftover"].get(slo), number)
    alone = cell["contestants"].get(f"inference-{slo}", {}).get("attainment", {}).get(slo)
    return found if alone is not None and alone >= FLOORS.get(slo, 0.0) else Cell(found.text, None)


def _speedup(cell: Result, slo: str) -> Cell:
    speedup, target = cell["speedup_vs_split"].get(slo), SPEEDUPS.get(cell["load"])
    if any(name in cell["contestants"] for name in SPLITS) and not cell["split_attains"].get(slo):
        return Cell("split misses SLO", None)
    if speedup is None or target is None:
        return Cell(times(speedup), None)
    found = _bounded(speedup, target, cell["bound_vs_split"].get(slo), times)
    return Cell(f"{found.text} (≥ {target})", found.met)


# ------------------------------------------------------------------------------------------------------------ case study
def burst(result: Result) -> Section:
    load, slo = result["load"], result["slo"]
    parts = ("before", "during", "after")
    says = (
        f"A job always trains; {number(load['rate'])} requests per second, and from {load['burst'][0]:.0f} to {load['burst'][1]:.0f} s "
        f"{number(load['times'])} times as many, opened by {load['jump']} at once. "
        f"Objectives: TTFT {number(slo['ttft_s'])} s, TPOT {1e3 * slo['tpot_s']:.0f} ms."
    )
    rows: list[list[str | Cell]] = [
        [
            part,
            number(result["requests"][part]),
            at_least(result["attainment"][part], FLOORS.get(slo["name"], 0.0), percent),
            *(number(result[key][part]) for key in ("p99_ttft_ms", "p99_tpot_ms", "max_gap_ms", "output_tok_s", "finetune_tok_s")),
        ]
        for part in parts
    ]
    headings = ["", "requests", "attainment", "p99 TTFT ms", "p99 TPOT ms", "longest gap ms", "output tok/s", "finetuning tok/s"]
    newcomers, back = result.get("newcomer_iterations_max"), result.get("comes_back_seconds")
    promise: list[list[str | Cell]] = [
        [
            "iterations until training has given way to the burst",
            Cell(number(result["gives_way_iterations"]), result["gives_way_iterations"] == 1),
            "1",
        ],
        [
            f"the most iterations until a request to an idle engine is computed (of {result.get('newcomers_to_idle', '?')})",
            Cell(number(newcomers), None if newcomers is None else newcomers == 1),
            "1",
        ],
        [
            "iterations with requests and training planned within their slack",
            at_least(result.get("planned_within_slack"), 1.0, percent),
            "100 %",
        ],
        ["and ended within it", percent(result.get("ended_within_slack")), "the latency model's error"],
        ["seconds until training is back at 80 % of its rate", number(back), "–"],
    ]
    blocks: list[Table | Picture] = [Table(headings, rows), Table(["", "figure", "target or bound"], promise)]
    caption = "Training gives way to the burst within an iteration and takes the machine back afterwards; grey: the burst."
    blocks.append(Picture("burst", caption, coserve_plots.burst(result)))
    caption = "The burst's first seconds, an iteration a bar: what it computed, and the time it took beside the slack it had."
    blocks.append(Picture("burst_zoom", caption, coserve_plots.burst_zoom(result)))
    return Section("Case study: a burst", says, blocks)


# --------------------------------------------------------------------------------------------------------- the single parts
def finetune(result: Result) -> Section:
    rows: list[list[str | Cell]] = [
        [
            f"{rows} tokens",
            number(r["tok_s"]),
            number(r["bound_tok_s"]),
            percent(r["tok_s"] / r["bound_tok_s"]),
            at_least(r["speedup_vs_peft"], 1.0, times),
            at_least(r["speedup_vs_peft_checkpointing"], 1.0, times),
            f"{megabytes(r['saved_bytes'])} of {megabytes(r['saved_bytes_peft'])}",
        ]
        for rows, r in result.get("by_rows", {}).items()
    ]
    headings = ["a LoRA step", "tok/s", "bound", "of bound", "vs PEFT (≥ 1)", "vs PEFT, checkpointing (≥ 1)", "MB kept, of PEFT's"]
    picture = Picture(
        "finetune", "Finetuning speed of each contestant; the line is what the machine's GEMMs allow.", plots.finetune(result)
    )
    says = "LoRA r16 on seven linears, batch 1, nothing else running. Ratios are medians of neighbouring steps."
    return Section("Finetuning alone, against Hugging Face PEFT", says, [Table(headings, rows), picture])


def serve(result: Result) -> Section:
    ours, bound, ratio = result["tok_s"], result.get("bound_tok_s", {}), result.get("ratio_vs_vllm") or {}
    rows: list[list[str | Cell]] = [
        [
            c,
            number(ours[c]),
            number((result.get("tok_s_vllm") or {}).get(c)),
            number((result.get("tok_s_hf") or {}).get(c)),
            number(bound.get(c)),
            at_least(ratio.get(c), 1.0, times),
        ]
        for c in ours
    ]
    headings = ["requests at once", "tok/s", "vLLM", "Hugging Face", "bound", "vs vLLM (≥ 1)"]
    picture = Picture("serve", "Output tokens per second by concurrency, prefill included.", plots.serve(result))
    says = f"{result['prompt_tokens']} prompt tokens, {result['output_tokens']} output tokens, greedy, closed loop."
    return Section("Serving alone, against vLLM", says, [Table(headings, rows), picture])


def memory(result: Result) -> Section:
    rows: list[list[str | Cell]] = []
    for tokens, found in result.get("measured", {}).items():
        for level in found["levels"].values():
            rows.append(
                [
                    f"{tokens} tokens, {level['level']}",
                    megabytes(level["measured_bytes"]),
                    megabytes(level["predicted_bytes"]),
                    number(level["predicted_vs_measured"]),
                    percent(level["share_of_peft"]),
                    number(level["speed_vs_keep"]),
                ]
            )
    headings = [
        "measured, default model",
        "MB",
        "predicted MB",
        "predicted / measured (1)",
        "of PEFT's saved bytes",
        "speed, of keeping all",
    ]
    picture = Picture(
        "memory", "On paper: activations of one sequence after each pass, GB; dashed, gradient checkpointing.", plots.memory(result)
    )
    says = (
        "What finetuning keeps of a sequence for its backward. On paper for large models, measured with the allocator for the default one."
    )
    return Section("Memory of finetuning", says, [Table(headings, rows), picture])


def latency(result: Result) -> Section:
    rows: list[list[str | Cell]] = [
        ["all", number(result.get("iterations")), percent(result["error_p50"]), percent(result["error_p95"])],
        *([kind, number(k["iterations"]), percent(k["p50"]), percent(k["p95"])] for kind, k in result.get("by_kind", {}).items()),
        ["bound: fitted to these iterations", "", percent(result.get("hindsight_p50")), percent(result.get("hindsight_p95"))],
        ["bound: one plan, repeated", "", percent(result.get("noise_p50")), percent(result.get("noise_p95"))],
    ]
    picture = Picture("latency", "Predicted against measured times of iterations; on the line they are equal.", plots.latency(result))
    says = "Predictions of iteration times, before the model learns from the iteration. None can do better than the machine's noise."
    return Section("Latency model", says, [Table(["iterations", "count", "error p50", "error p95"], rows), picture])


def schedule(result: Result) -> Section:
    rows: list[list[str | Cell]] = []
    for state, found in result["states"].items():
        of = f"{found['running']:.0f} running, {found['waiting']:,} waiting, finetuning in {found['share_with_finetuning']:.0%}"
        rows.append([f"schedule(): {of}", number(found["median_ms"]), number(found["p99_ms"]), number(found["max_ms"])])
        rows.append([f"update(), {state}", number(found["update_median_ms"]), number(found["update_p99_ms"]), ""])
    picture = Picture("schedule", "Times of schedule(), from every 20th iteration.", plots.schedule(result))
    says = f"{result['jobs']} jobs, {result['iterations']:,} iterations of either state. Targets: median below 0.2 ms, p99 below 1 ms."
    return Section("Time to plan an iteration", says, [Table(["", "median ms", "p99 ms", "longest ms"], rows), picture])


def simulate(result: Result) -> Section:
    title = "Simulated against measured"
    says = "The same requests on the virtual clock of the simulator, beside what was measured; 1 is a perfect prediction."
    pairs = simulated_pairs(result)
    rows: list[list[str | Cell]] = [
        [label, name, number(s), number(m), number(s / m) if m else "–"] for label, figures in pairs for name, s, m in figures
    ]
    headings = ["workload", "figure", "simulated", "measured", "ratio (1)"]
    picture = Picture("simulate", "Every figure simulated over measured; the band is 10 % either way.", plots.simulate(pairs))
    return Section(title, says, [Table(headings, rows), picture] if pairs else [])


def simulated_pairs(result: Result) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Per workload: (figure, simulated, measured) of what both have."""
    if "workloads" in result:
        loads = [
            (", ".join(str(w[k]) for k in ("trace", "load", "contestant") if k in w), w["simulated"], w["measured"])
            for w in result["workloads"]
        ]
    else:
        predicted, measured = result.get("predicted", {}), result.get("measured", {})
        loads = [(mode.replace("_", " "), predicted[mode], measured[mode]) for mode in predicted if mode in measured]
    both = [(label, [(k, s[k], m[k]) for k in s if isinstance(s[k], int | float) and m.get(k) is not None]) for label, s, m in loads]
    return [(label, figures) for label, figures in both if figures]


def paper(result: Result) -> Section:
    models = result.get("models", {})
    rows: list[list[str | Cell]] = []
    for name, model in models.items():
        theirs = result.get("paper", {}).get(name, {})
        known = dict(zip(theirs.get("rates", []), theirs.get("finetune_tok_s", []), strict=False))
        for contestant, found in plots.contestants_of(model):
            speeds, shares = found.get("finetune_tok_s", []), found.get("attainment", [])
            for rate, speed, share in zip_longest(model.get("rates", []), speeds, shares):
                reference = known.get(rate) if contestant == "coserve" else None
                rows.append([f"{name}, {contestant}", number(rate), number(speed), number(reference), percent(share)])
    blocks: list[Table | Picture] = []
    if models:
        blocks.append(
            Picture("paper", "Finetuning speed and attainment by request rate, simulated; crosses: the paper.", plots.paper(result))
        )
        blocks.append(Table(["model, contestant", "req/s", "finetuning tok/s", "the paper's", "attainment"], rows))
    says = "arXiv 2402.18789 on the simulator, with its models and rates. " + "; ".join(result.get("assumptions", []))
    return Section("The paper's end-to-end experiment, simulated", says, blocks)


def gpu_suite(result: Result) -> Section:
    blocks: list[Table | Picture] = []
    for name, model in ((n, m) for n, m in result.items() if isinstance(m, Mapping) and "decode" in m):
        steps = [[f"batch {batch}", f"{at['ms']:.1f}", f"{at['bound_ms']:.1f}"] for batch, at in model["decode"].items()]
        blocks.append(Table(["decode step", "ms", "bound, ms"], [list[str | Cell](row) for row in steps], name))
        rows: list[list[str | Cell]] = []
        for rate, alone, coserved in zip(model["rates"], model["inference"], model["coserve"], strict=True):
            rows.append(
                [
                    number(rate),
                    str(coserved["requests"]),
                    percent(alone["attainment"]),
                    Cell(percent(coserved["attainment"]), coserved["attainment"] >= alone["attainment"] - WITHIN),
                    f"{coserved['p99_ttft_ms']:,.0f}",
                    f"{coserved['mean_tpot_ms']:.1f}",
                    number(coserved["finetune_tok_s"]),
                ]
            )
        headings = ["requests/s", "requests", "attained alone", "attained, coserve", "p99 TTFT, ms", "mean TPOT, ms", "finetuning tok/s"]
        trains = model["finetune_alone"]
        note = (
            f"Finetuning alone, LoRA r16: on down_proj, as beside the requests, {number(trains['down_proj'])} tok/s, on all linears "
            f"{number(trains['all_linears'])}; the bound by FLOPs is {number(trains['bound_tok_s'])}."
        )
        blocks.append(Table(headings, rows, "", note))
    says = (
        "Models of real shapes with random weights on one device, in process: the paper's objectives (TTFT 5 s; TPOT 45 ms for 8B, else "
        "75 ms), made-up arrivals of the lengths of the Azure conversation trace. Bounds: the bytes that a step must read over a copy's "
        "bandwidth; a training token's FLOPs over a GEMM's."
    )
    return Section("On a GPU", says, blocks)


SECTIONS: dict[str, Callable[[Result], Section]] = {
    "coserve": coserve,
    "burst": burst,
    "finetune": finetune,
    "serve": serve,
    "memory": memory,
    "latency": latency,
    "schedule": schedule,
    "simulate": simulate,
    "paper": paper,
    "gpu_suite": gpu_suite,
}
