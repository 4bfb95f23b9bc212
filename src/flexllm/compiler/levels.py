"""From choices per layer to the levels of a job: how much its sequences keep, from the fastest to the smallest.

    keep         everything that the pruned backward reads (to compare with; never the best)
    recompute    the fastest: whatever is cheaper to rebuild than to write and read back is rebuilt
    ...          down the convex hull of (bytes, seconds); between two of its points some layers are at one, the others at the next
    checkpoint   the fewest bytes per layer: about the layer's input, the rest is rebuilt from it and the K/V pages
    segments     the input of every few layers; a backward slice rebuilds its rows through that many layers first
    kv           nothing but the K/V pages: every slice starts from the token ids and goes through all layers

All but the last two go back layer by layer (any number of rows at a time). Those need dK/dV accumulators for several layers at
once; with layers in segments of g, inputs and accumulators together are fewest for g about the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexllm.checks import require
from flexllm.compiler.program import LayerBackward, LayerCompiler, LayerKind
from flexllm.compiler.remat import Choice, DeviceCosts, SavedTensor, saved_tensor
from flexllm.core import SaveLevel
from flexllm.model.config import ModelConfig
from flexllm.ops.reference import ReferenceKernels
from flexllm.peft.base import Binding

MIXES = 8  # levels from one point of the hull to the next
WORTH = 0.97  # a level takes at most this share of the bytes of the one before it


@dataclass(frozen=True)
class LevelProgram:
    """A job's layers at one level. With `depth` > 1 only the inputs of whole segments are stored; `layers` are then compiled for
    what a slice keeps while it goes through its segment."""

    level: SaveLevel
    layers: tuple[LayerBackward, ...]  # from the lowest adapted one up
    lowest_layer: int
    hidden_size: int

    @property
    def depth(self) -> int:
        return self.level.depth

    def layer(self, index: int) -> LayerBackward:
        return self.layers[index - self.lowest_layer]

    def stored(self, index: int) -> tuple[SavedTensor, ...]:
        """What the forward of a layer has to store."""
        if index < self.lowest_layer:
            return ()
        if self.depth == 1:
            return self.layer(index).saved
        top = self.lowest_layer + len(self.layers) - 1
        starts_segment = index == self.lowest_layer or (top - index + 1) % self.depth == 0
        return (SavedTensor("x", self.hidden_size),) if starts_segment and index > 0 else ()  # layer 0 starts from token ids


class JobCompiler:
    """All that a job's backward passes are made from. Nothing is emitted before it is asked for."""

    def __init__(
        self,
        config: ModelConfig,
        binding: Binding,
        adapted: Sequence[int],
        kernels: ReferenceKernels,
        costs: DeviceCosts,
        context: int,
        itemsize: int = 2,
    ) -> None:
        """`adapted`: layer numbers. `context`: mean keys a row sees. `itemsize`: bytes of the model's type."""
        self.config, self.itemsize = config, itemsize
        self.lowest_layer, self.num_layers = min(adapted), config.num_layers
        self.kinds = [LayerKind(i in adapted, i == 0, i > self.lowest_layer) for i in range(self.lowest_layer, self.num_layers)]
        self.compilers = {k: LayerCompiler(config, binding, k, kernels, costs, context) for k in set(self.kinds)}
        self._frontiers = {k: c.remat.frontier() for k, c in self.compilers.items()}
        self._named = {plan.level.name: plan for plan in self._all()}

    # ----------------------------------------------------------------------------------------------------------- levels
    def levels(self, name: str) -> tuple[LevelPlan, ...]:
        """The levels for a `FinetuneConfig.save_level`: one, or for "auto" all from the fastest down. ValueError: no such level."""
        if name == "auto":
            return self._ladder()
        require(name in self._named, "save_level", f"one of auto, {', '.join(self._named)}", name)
        return (self._named[name],)

    def named(self, names: Sequence[str]) -> LevelPlan:
        """A level that saves the same named values in every layer, as far as the layer's backward needs any of them."""
        return self._uniform("named", {k: c.remat.named(self._useful(c, names)) for k, c in self.compilers.items()})

    @staticmethod
    def _useful(compiler: LayerCompiler, names: Sequence[str]) -> list[str]:
        known = {name for n in compiler.pruned.forward for name in n.meta.get("names", ())}
        return [n for n in names if n in known]

    def _ladder(self) -> tuple[LevelPlan, ...]:
        """Levels each of which is worth its loss of time; of a model with few layers, some of those with a name fall away."""
        plans = [plan for name, plan in self._named.items() if name != "keep"]
        chosen = plans[:1]
        for plan, after in zip(plans[1:], [*plans[2:], None], strict=True):
            last = after is None or after.level.bytes_per_token >= plan.level.bytes_per_token
            if plan.level.bytes_per_token < chosen[-1].level.bytes_per_token * (1.0 if last else WORTH):
                chosen.append(plan)
        return tuple(chosen)

    def _all(self) -> list[LevelPlan]:
        main = max(self.compilers, key=self.kinds.count)
        points = self._frontiers[main]
        keep = self._uniform("keep", {k: c.remat.keep() for k, c in self.compilers.items()})
        plans = [keep, self._uniform("recompute", {k: f[0] for k, f in self._frontiers.items()})]
        for i in range(1, len(points)):
            price = (points[i].seconds - points[i - 1].seconds) / max(1, points[i - 1].bytes_per_token - points[i].bytes_per_token)
            before = plans[-1].choices
            after = self._at_price(price)
            for mix in range(1, MIXES + 1):
                count = len(self.kinds) * mix // MIXES
                name = f"remat {i - 1 + mix / MIXES:g}"
                mixed = tuple(a if n < count else b for n, (a, b) in enumerate(zip(after, before, strict=True)))
                plans.append(LevelPlan(self, name, mixed))
        plans.append(self._uniform("checkpoint", {k: f[-1] for k, f in self._frontiers.items()}))
        depth = max(2, round(math.sqrt(len(self.kinds))))
        return [*plans, self._segments("segments", depth), self._segments("kv", max(2, len(self.kinds)))]

    def _at_price(self, price: float) -> tuple[Choice, ...]:
        """Each layer's cheapest point at a price (seconds) per byte, of equals the smallest."""

        def best(kind: LayerKind) -> Choice:
            return min(reversed(self._frontiers[kind]), key=lambda c: c.seconds + price * (1 + 1e-9) * c.bytes_per_token)

        chosen = {k: best(k) for k in self.compilers}
        return tuple(chosen[k] for k in self.kinds)

    def _uniform(self, name: str, choices: dict[LayerKind, Choice]) -> LevelPlan:
        return LevelPlan(self, name, tuple(choices[k] for k in self.kinds))

    def _segments(self, name: str, depth: int) -> LevelPlan:
        return LevelPlan(self, name, tuple(self._frontiers[k][0] for k in self.kinds), depth)


class LevelPlan:
    """A level before it is compiled: its bytes and its time. `choices`: of each layer, from the lowest adapted one up."""

    def __init__(self, job: JobCompiler, name: str, choices: tuple[Choice, ...], depth: int = 1) -> None:
        self.job, self.choices = job, choices
        base = sum(job.compilers[k].backward_seconds for k in job.kinds)
        extra = sum(c.again_seconds for c in choices)
        self.recomputed_flops = sum(c.again_flops for c in choices)
        if depth > 1:  # the whole forward of a segment again, and what its layers keep of it rebuilt as at the fastest level
            extra += sum(job.compilers[k].forward_seconds for k in job.kinds)
            self.recomputed_flops += sum(job.compilers[k].forward_flops for k in job.kinds)
        self.saved_bytes = self._saved_bytes(depth)
        self.level = SaveLevel(name, self.saved_bytes + self._gradient_bytes(depth), 1 + extra / base if base else 1.0, depth)

    def _saved_bytes(self, depth: int) -> int:
        """Per token, all layers; K/V pages apart."""
        job = self.job
        if depth > 1:
            count = len(job.kinds)
            stored = -(-count // depth) - (job.lowest_layer == 0)
            return stored * job.config.hidden_size * job.itemsize
        return sum(saved_tensor(n).bytes_per_token(job.itemsize) for c in self.choices for n in c.saved)

    def _gradient_bytes(self, depth: int) -> int:
        """Per token: the gradient on its way down, and the dK/dV accumulators of the layers under way or, before there are any, the rows
        of a window that was interrupted."""
        config, itemsize = self.job.config, self.job.itemsize
        row = config.hidden_size * itemsize
        accumulators = 2 * config.num_kv_heads * config.head_dim * max(4, itemsize)
        return row + max(row, min(depth, len(self.job.kinds)) * accumulators)

    def program(self) -> LevelProgram:
        job = self.job
        layers = tuple(job.compilers[k].compile(c) for k, c in zip(job.kinds, self.choices, strict=True))
        return LevelProgram(self.level, layers, job.lowest_layer, job.config.hidden_size)
