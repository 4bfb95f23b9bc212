"""Many replicas: what each of them does, and which one a request goes to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flexllm.config import SchedulerConfig

PATIENCE = 4096  # tokens that a replica may be ahead of the least loaded one before its adapters' requests go elsewhere


class Router:
    """The replica with the fewest outstanding tokens; requests of an adapter stay with the one that had it last, if that one is
    not much busier. A router knows no output lengths, so what is outstanding are prompts and the tokens so far."""

    def __init__(self, replicas: int) -> None:
        self.load = np.zeros(replicas)
        self.moves = 0  # an adapter came to a replica that it was not at
        self._home: dict[str, int] = {}

    def choose(self, adapter: str | None) -> int:
        least = int(self.load.argmin())
        if adapter is None:
            return least
        home = self._home.get(adapter)
        if home is not None and self.load[home] <= self.load[least] + PATIENCE:
            return home
        self.moves += 1
        self._home[adapter] = least
        return least


def fleet(split: str, replicas: int, config: SchedulerConfig, finetuning: int = 0) -> list[SchedulerConfig]:
    """Policies of `replicas` machines. "coserve" and "temporal": all serve and finetune; "separate": the last `finetuning` of them
    finetune and do nothing else, the others only serve; "inference": all only serve. ValueError for any other split."""
    if split == "separate":
        if not 0 <= finetuning <= replicas:
            raise ValueError(f"finetuning must be between 0 and the {replicas} replicas, got {finetuning}")
        modes = ["inference"] * (replicas - finetuning) + ["finetune"] * finetuning
    elif split in ("coserve", "temporal", "inference"):
        modes = [split] * replicas
    else:
        raise ValueError(f"split must be one of coserve, temporal, separate, inference, got {split!r}")
    return [replace(config, mode=mode) for mode in modes]
