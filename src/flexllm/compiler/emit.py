"""Write the functions that the engine executes, as Python source over the kernels.

`emit_forward`  forward(x, w, p, t, ctx) -> y            (with `ctx.save(name, value)` where something is to be kept)
`emit_backward` backward(dy, s, w, p, t, ctx) -> dx|None  (`s[name]`: saved rows; `ctx.gradient(name, value)` per parameter)

w: the layer's weights, p: parameters by "<site>.<name>", t: per-row tables, ctx: what touches pages and accumulators.
Values die (`del`) after their last use. Sums are flattened so that low-rank products are added into a fresh tensor in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from flexllm.compiler.prune import PrunedBackward, is_row_value
from flexllm.compiler.remat import read_by
from flexllm.ops.operators import Operator, add, attend, concat, is_operator, linear, linear_dx, matmul_nn, split
from flexllm.ops.reference import ReferenceKernels


@dataclass(frozen=True)
class Emitted:
    """`live_columns`: elements per row of the values that are alive together at most, arguments and what `s` holds left out;
    `attention_columns`: the same while attention runs, which has a working memory of its own."""

    source: str
    function: Callable[..., Any]
    live_columns: int
    attention_columns: int


def emit_forward(backward: PrunedBackward, kernels: ReferenceKernels, saves: Iterable[str] = ()) -> Emitted:
    """`saves`: names to hand to ctx.save (ctx.save_pooled for values whose columns are pooled over adapters)."""
    layer = backward.joint.layer
    named = {name: n for n in backward.forward for name in n.meta.get("names", ())}
    kept = {named[name]: name for name in saves}
    body = _Body(outputs={layer.output}, kept=set(kept))
    body.live = set(backward.joint.forward_nodes) | kept.keys()
    if layer.x in kept:
        body.lines.append(f"ctx.save({kept[layer.x]!r}, x)")
    for node in layer.graph.nodes:
        if node not in body.live:
            continue
        if node not in backward.joint.forward_nodes and node.meta["pooled"]:  # each adapter's columns are compressed on their own
            source, pack = body.ref(node.args[0]), f"ops.{node.target.name}"  # type: ignore[union-attr]
            body.lines.append(f"ctx.save_pooled({node.meta['pooled']!r}, {kept[node]!r}, {source}, {pack})")
            body.last_use[source] = len(body.lines) - 1
            continue
        body.emit(node)
        for value in results_of(node):
            if value in kept:
                call = f"save_pooled({value.meta['pooled']!r}, " if value.meta.get("pooled") else "save("
                body.lines.append(f"ctx.{call}{kept[value]!r}, {body.ref(value)})")
                body.last_use[body.ref(value)] = len(body.lines) - 1
    body.lines.append(f"return {body.ref(layer.output)}")
    return body.compile("forward", "x, w, p, t, ctx", kernels)


def emit_backward(backward: PrunedBackward, saved: Iterable[Node], kernels: ReferenceKernels) -> Emitted:
    """`saved`: the values that `s` holds; whatever else the gradients read is computed again."""
    saved = set(saved)
    body = _Body(outputs=set(backward.outputs.values()), kept=set(), in_pages=True)
    body.names.update({node: f"s[{node.meta['names'][0]!r}]" for node in saved})
    body.inputs.update(saved)
    emitted: set[Node] = set(saved)
    parameter_of = {grad: name for name, grad in backward.outputs.items() if name != "x"}

    def visit(node: Node) -> None:
        """Depth first, so that a recomputed value appears just before its first reader."""
        if node in emitted:
            return
        emitted.add(node)
        assert node.op != "placeholder" or not is_row_value(node) or node is backward.joint.dy, f"{node} is not saved"
        if node.op == "placeholder":
            return
        for source in read_by(node):
            visit(source)
        body.emit(node)
        for value in results_of(node):
            if value in parameter_of:
                body.lines.append(f"ctx.gradient({parameter_of[value]!r}, {body.ref(value)})")
                body.last_use[body.ref(value)] = len(body.lines) - 1

    body.live = reachable(backward, saved)
    # In graph order, so that each gradient is complete (and its inputs can die) as early as reverse mode allows.
    for node in backward.joint.layer.graph.nodes:
        if node in backward.live:
            visit(node)
    dx = backward.outputs.get("x")
    body.lines.append(f"return {body.ref(dx)}" if dx is not None else "return None")
    return body.compile("backward", "dy, s, w, p, t, ctx", kernels)


def reachable(backward: PrunedBackward, saved: set[Node]) -> set[Node]:
    """Every node the emitted backward runs: the live gradients and what they recompute."""
    live: set[Node] = set()
    todo = list(backward.live)
    while todo:
        node = todo.pop()
        if node not in live and node not in saved:
            live.add(node)
            todo.extend(read_by(node))
    return live


def is_sum_over_rows(node: Node) -> bool:
    """A parameter's gradient, which has no row per token."""
    return isinstance(node.target, Operator) and node.target.shard == "reduce"


def results_of(node: Node) -> list[Node]:
    """The values an operator makes: itself, or the items of its tuple. An item makes nothing."""
    if not is_operator(node):
        return []
    return [u for u in node.users if u.target is operator.getitem] if isinstance(node.meta["columns"], tuple) else [node]


@dataclass
class _Body:
    """Lines of a function being written. A sum node is written where its last term is known."""

    outputs: set[Node]
    kept: set[Node]  # values that are saved: never overwritten, never folded into a larger sum
    in_pages: bool = False  # attention's keys and values are in the pages: it is given none
    lines: list[str] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)
    inputs: set[Node] = field(default_factory=set)
    last_use: dict[str, int] = field(default_factory=dict)
    folded: set[Node] = field(default_factory=set)
    made: list[tuple[int, str, int, str | None]] = field(default_factory=list)  # (line, name, columns, the value it is a view of)
    live: set[Node] | None = None  # None: every node of the graph

    def users(self, node: Node) -> list[Node]:
        return [u for u in node.users if self.live is None or u in self.live]

    def ref(self, value: Any) -> str:
        """The expression for an argument."""
        if not isinstance(value, Node):
            return repr(value)
        if value in self.names:
            return self.names[value]
        if value.op == "placeholder":
            return value.meta["source"]
        return value.meta["names"][0].replace(".", "_") if "names" in value.meta else value.name

    def emit(self, node: Node) -> None:
        if not is_operator(node):
            return  # getitem: named when its tuple is unpacked
        op = node.target
        assert isinstance(op, Operator)
        if self._folds_into_sum(node):
            self.folded.add(node)
            return
        if op is add:
            self._emit_sum(node)
            return
        target = f"ctx.{op.name}" if op.context else f"ops.{op.name}"
        given = [self._read(node.args[0]), "None", "None"] if op is attend and self.in_pages else [self._read(a) for a in node.args]
        self.lines.append(f"{self._results(node)} = {target}({', '.join(given)})")
        for name in self._results(node).split(", "):
            self.last_use.setdefault(name, len(self.lines) - 1)
        self._note_sizes(node)

    def _results(self, node: Node) -> str:
        if not isinstance(node.meta["columns"], tuple):
            return self.ref(node)
        items = {u.args[1]: self.ref(u) for u in self.users(node) if u.target is operator.getitem}
        return ", ".join(items.get(i, "_") for i in range(len(node.meta["columns"])))

    def _note_sizes(self, node: Node) -> None:
        """What an operator's results take; those of `split`, and halves put together again, are views."""
        whole = node.all_input_nodes[0] if node.all_input_nodes else node
        halves = node.target is concat and all(n.target is operator.getitem for n in node.all_input_nodes)
        view_of = self.ref(whole) if node.target is split or halves else None
        for value in results_of(node):
            if value in self.users(node) or value is node:
                columns = 0 if is_sum_over_rows(node) else value.meta["columns"]
                self.made.append((len(self.lines) - 1, self.ref(value), columns, view_of))

    def _live_columns(self, dying: dict[int, list[str]]) -> tuple[int, int]:
        """The most elements per row that are alive after any line, and after a line with attention."""
        owner: dict[str, str] = {}  # the value whose memory a name stands for
        size: dict[str, int] = {}
        most, most_with_attention, made = 0, 0, iter(sorted(self.made, key=lambda m: m[0]))
        pending = next(made, None)
        for line in range(len(self.lines)):
            while pending is not None and pending[0] == line:
                _, name, columns, view_of = pending
                owner[name] = owner.get(view_of, name) if view_of is not None else name
                size.setdefault(owner[name], columns)
                pending = next(made, None)
            alive = sum(size[o] for o in set(owner.values()))
            most = max(most, alive)
            if "ctx.attend" in self.lines[line]:
                most_with_attention = max(most_with_attention, alive)
            for name in dying.get(line, ()):
                owner.pop(name, None)
        return most, most_with_attention

    def _read(self, arg: Any) -> str:
        name = self.ref(arg)
        if isinstance(arg, Node) and arg.op != "placeholder" and arg not in self.inputs:
            self.last_use[name] = len(self.lines)
        return name

    # --------------------------------------------------------------------------------------------------------- sums
    def _single_use_in_add(self, node: Node) -> bool:
        users = self.users(node)
        single = len(users) == 1 and users[0].target is add and users[0].args[0] is not users[0].args[1]
        return single and node not in self.kept and node not in self.outputs

    def _folds_into_sum(self, node: Node) -> bool:
        return node.target in (add, matmul_nn) and self._single_use_in_add(node)

    def _terms(self, node: Node) -> list[Node]:
        terms: list[Node] = []
        for arg in node.args:
            assert isinstance(arg, Node)
            terms += self._terms(arg) if arg in self.folded and arg.target is add else [arg]
        return terms

    def _emit_sum(self, node: Node) -> None:
        """t0 + t1 + ...: into a fresh term in place where there is one, low-rank products last."""
        terms = self._terms(node)
        products = [t for t in terms if t in self.folded]
        plain = sorted((t for t in terms if t not in self.folded), key=lambda t: not self._is_fresh(t))
        name = self.ref(node)
        view_of = None
        if plain and self._is_fresh(plain[0]):
            view_of = self.ref(plain[0])
            self.lines.append(f"{name} = {self._read(plain[0])}")
        elif len(plain) >= 2:
            self.lines.append(f"{name} = ops.add({self._read(plain[0])}, {self._read(plain[1])})")
            plain = plain[1:]
        elif plain:
            first = products.pop(0)
            self.lines.append(f"{name} = ops.add_matmul_nn({', '.join(self._read(a) for a in (plain[0], *first.args))})")
        else:
            first = products.pop(0)
            self.lines.append(f"{name} = ops.matmul_nn({', '.join(self._read(a) for a in first.args)})")
        self.last_use[name] = len(self.lines) - 1
        self.made.append((len(self.lines) - 1, name, node.meta["columns"], view_of))
        for term in plain[1:]:
            self.lines.append(f"ops.add_({name}, {self._read(term)})")
        for product in products:
            self.lines.append(f"ops.add_matmul_nn_({name}, {', '.join(self._read(a) for a in product.args)})")
        self.last_use[name] = len(self.lines) - 1

    def _is_fresh(self, node: Node) -> bool:
        """A tensor (or a column slice) that nothing else reads, so that it may be written over."""
        if not self._single_use_in_add(node) or node in self.inputs:
            return False
        if node.target is not operator.getitem:
            return node.target in (linear, linear_dx)
        whole = node.all_input_nodes[0].all_input_nodes[0]  # which its other columns and the result of a split share
        shared = whole in self.kept or whole in self.inputs or len(self.users(whole)) > 1
        return node.all_input_nodes[0].target is split and whole.target is linear and not shared

    # ------------------------------------------------------------------------------------------------------ compile
    def compile(self, name: str, arguments: str, kernels: ReferenceKernels) -> Emitted:
        dying: dict[int, list[str]] = {}
        returned = self.lines[-1].removeprefix("return ")
        for value, used in self.last_use.items():
            if value not in ("_", returned):
                dying.setdefault(used, []).append(value)
        text = [f"def {name}({arguments}):"]
        for i, line in enumerate(self.lines):
            text.append(f"    {line}")
            if i in dying:
                text.append(f"    del {', '.join(sorted(dying[i]))}")
        source = "\n".join(text) + "\n"
        scope: dict[str, Any] = {"ops": kernels}
        exec(compile(source, f"<flexllm {name}>", "exec"), scope)
        return Emitted(source, scope[name], *self._live_columns(dying))
