"""An iteration under way, and how it gives way to a request, as the engine's does."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from flexllm.core import StepPlan
from flexllm.scheduler.latency import LatencyModel, features_of


@dataclass(frozen=True, slots=True)
class Iteration:
    """What runs from `start` to `end`. Times in seconds; `factor`: those it takes over those that the latency model says."""

    plan: StepPlan
    start: float
    end: float
    factor: float

    @classmethod
    def begin(cls, plan: StepPlan, start: float, factor: float, latency: LatencyModel) -> Iteration:
        return cls(plan, start, start + factor * latency.predict(plan.features or features_of(plan)), factor)

    def interrupted(self, now: float, latency: LatencyModel, patience: float) -> Iteration:
        """What is left of it when a request comes `now`, before its end: finetuning stops at the next boundary.

        In the forward that is the next layer (inference goes on alone through the others, the windows are suspended) unless all of it
        ends within `patience`, in the backward the end of the slice under way. An optimizer step that has begun is finished.
        """
        assert self.start <= now < self.end
        plan = self.plan
        if plan.interrupted or not (plan.windows or plan.backward or plan.optimizer_steps):
            return self
        if plan.windows:
            alone = plan.cut()
            whole, rest = (self.factor * latency.predict(features_of(p)) for p in (plan.cut(plan.windows), alone))
            spent = now - self.start
            if spent + patience < whole:
                layers = plan.windows[0].sequence.job.num_layers
                first = 0 if plan.inference else min(w.layer for w in plan.windows)
                done = math.ceil(spent / whole * (layers - first))
                share = done / (layers - first) if first < layers else 1.0
                suspended = tuple((w, max(w.layer, first + done)) for w in plan.windows)
                return replace(self, plan=plan.cut(suspended=suspended), end=self.start + share * whole + (1 - share) * rest)

        forward = features_of(plan.cut(plan.windows))

        def end(slices: int) -> float:
            backward = features_of(StepPlan(backward=plan.backward[:slices]))
            return self.start + self.factor * latency.predict(forward + backward)

        everything = len(plan.backward)
        slices = bisect_left(range(everything + 1), now, key=end)
        if slices > everything or (slices == everything and not plan.optimizer_steps):
            return self
        return replace(self, plan=plan.cut(plan.windows, plan.backward[:slices]), end=end(slices))
