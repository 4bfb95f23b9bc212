"""Pictures of what the compiler decided (matplotlib, the extra `plot`)."""

from __future__ import annotations

import operator
from pathlib import Path

from torch.fx import Node

from flexllm.cli.plotting import pyplot
from flexllm.compiler.prune import is_row_value
from flexllm.compiler.remat import producer
from flexllm.compiler.report import CompileReport, report_compiler, tensor_rows
from flexllm.model.config import ModelConfig
from flexllm.ops.operators import is_operator
from flexllm.peft.config import PeftConfig

COLOURS = {"kept": "#f2c14e", "compressed": "#c77dff", "recomputed": "#6cc5d9", "paged": "#8bc34a", "pruned": "#d9d9d9"}
NAMED = ("keep", "recompute", "checkpoint", "segments", "kv")  # levels that are labelled


def levels(report: CompileReport, path: Path) -> None:
    """Memory against time: every level a point, the frontier a line."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    tokens = report.seq_length * report.batch
    points = [(row.total_bytes / 1e6, row.relative_time, row.level) for row in report.levels]
    frontier = [p for p in points if not any(q[0] <= p[0] and q[1] < p[1] for q in points)]
    axes.plot([p[0] for p in frontier], [p[1] for p in frontier], color="#888", linewidth=1, zorder=1)
    axes.scatter([p[0] for p in points], [p[1] for p in points], color="#1f77b4", s=22, zorder=2)
    for megabytes, time, name in points:
        if name in NAMED:
            axes.annotate(name, (megabytes, time), textcoords="offset points", xytext=(6, 5))
    axes.set(xlabel=f"MB for {tokens} tokens (saved activations and gradients in flight)", ylabel="time of a backward row", xscale="log")
    axes.set_title(report.title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def layer(config: ModelConfig, peft: PeftConfig, save_level: str, seq_length: int, path: Path) -> None:
    """The forward graph of the most common kind of layer: a box per value, from the layer's input (left) to its output."""
    plt = pyplot()
    job = report_compiler(config, peft, seq_length)
    main = max(job.compilers, key=job.kinds.count)
    plan = job.levels("recompute" if save_level == "auto" else save_level)[0]
    compiler, choice = job.compilers[main], plan.choices[job.kinds.index(main)]
    decided = {row.tensor: row for row in tensor_rows(compiler, choice)}
    values = [n for n in compiler.pruned.joint.layer.graph.nodes if n in compiler.pruned.forward and is_row_value(n)]
    again = compiler.remat.recomputed(choice.saved)

    depth: dict[Node, int] = {}
    rows: dict[int, list[Node]] = {}
    for node in values:
        sources = _sources(node)
        depth[node] = 1 + max((depth[s] for s in sources), default=-1)
        rows.setdefault(depth[node], []).append(node)
    place = {n: (d, (len(column) - 1) / 2 - i) for d, column in rows.items() for i, n in enumerate(column)}
    figure, axes = plt.subplots(figsize=(1.45 * len(rows), 0.75 * max(map(len, rows.values())) + 1.5))
    for node in values:
        for source in _sources(node):
            arrow = {"arrowstyle": "-|>", "color": "#999", "shrinkA": 24, "shrinkB": 24, "lw": 0.8}
            axes.annotate("", xy=place[node], xytext=place[source], arrowprops=arrow)
    for node in values:
        names = node.meta.get("names", ())
        row = decided.get(names[0]) if names else None
        decision = row.decision if row else "recomputed" if producer(node) in again else "pruned"
        size = f"\n{row.bytes_per_token:,} B" if row else ""
        label = f"{names[0] if names else producer(node).name}{size}"
        box = {"boxstyle": "round,pad=0.35", "facecolor": COLOURS[decision], "edgecolor": "#555", "linewidth": 0.6}
        axes.text(*place[node], label, ha="center", va="center", fontsize=6.5, bbox=box)
    for decision, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=decision, marker="s", s=60)
    axes.legend(loc="lower right", fontsize=8, ncols=len(COLOURS), frameon=False)
    axes.set_title(f"{config.model_type}, {peft.type}: one layer's forward at level {plan.level.name}; bytes per token, bf16", fontsize=10)
    tallest = max(map(len, rows.values()))
    axes.set(xlim=(-0.6, len(rows) - 0.4), ylim=(-tallest / 2 - 0.7, tallest / 2 + 0.3))  # texts and arrows do not count in limits
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _sources(node: Node) -> list[Node]:
    """The row values that a value is made from, through tuples."""
    found = []
    for source in producer(node).all_input_nodes if is_operator(producer(node)) else ():
        if is_row_value(source):
            found.append(source)
        elif source.target is not operator.getitem and is_operator(source):
            found += _sources(source)
    return found
