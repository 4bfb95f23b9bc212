"""What a PEFT method is to the rest of the engine: parameters at sites, and a function written in operators.

A method has no backward of its own; the compiler differentiates `apply`. The same `apply` serves two bindings: the fused
forward passes pooled parameters (those of all resident adapters, the tables selecting each row's share), a job's backward
passes that job's own (and constants in place of the tables). A new method is one file: a `PeftConfig` with its settings and
a `PeftMethod` that names it as its `config_type`.

Parameters are pooled in one of two ways. "rank": an adapter has a run of rows among those of all the others, and a mask over
rows and ranks selects it (LoRA's A and B). "slot": an adapter has one row, and an index per batch row selects it; row 0 is
`neutral`, for whatever is not adapted.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.peft.config import PeftConfig, peft_config, peft_settings

COMMON_SETTINGS = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")  # in every adapter's file


@dataclass(frozen=True)
class Parameter:
    """`rows` x `width` of one adapter at one site of one layer."""

    rows: int
    width: int
    pooling: Literal["rank", "slot"] = "rank"
    neutral: float = 0.0  # what rows hold that are nobody's, or an adapter's that does without
    trainable: bool = True
    shared: bool = False  # one tensor for all layers (not trainable)


@dataclass(frozen=True)
class Site:
    """A place in the layer while it is traced. `bias`: the frozen bias that `y` includes."""

    name: str
    x: Proxy
    y: Proxy
    bias: Proxy | None
    kind: str
    features: frozenset[str]


class PeftMethod(ABC):
    """Stateless; one instance serves all adapters of its kind."""

    config_type: ClassVar[type[PeftConfig]]
    peft_type: ClassVar[str] = ""  # the name in PEFT's files; "": PEFT has no such method

    def kind(self, config: Any) -> str:
        """Adapters of one kind share a pool, tables and a place in the graph."""
        return config.type

    def features(self, config: Any) -> frozenset[str]:
        """What `apply` has to know of a configuration: its sites, and the names of what else changes the graph. The union
        over the adapters in a batch must serve all of them."""
        return frozenset(config.target_modules)

    def rank(self, config: Any) -> int:
        """Rows in the rank-pooled parameters; 0: it has none."""
        return 0

    def scale(self, config: Any) -> float:
        """What the rank mask holds for its rows."""
        return 1.0

    @abstractmethod
    def parameters(self, site: str, out_features: int, in_features: int, rank: int, features: frozenset[str]) -> Mapping[str, Parameter]:
        """Parameters by name at a site of these sizes; none where it does not attach."""

    @abstractmethod
    def apply(self, site: Site, p: Mapping[str, Proxy], t: Mapping[str, Any]) -> Proxy:
        """`site.x`: input of the base linear (or sublayer), `site.y`: its output. Returns the new output.

        `t`: "mask" for scale_columns, "slot" for the *_slot operators, "rows" for replace_rows, "dropout" and "layer" for dropout.
        """

    def initialise(self, config: Any, name: str, tensor: Tensor, generator: Generator, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Fill parameter `name` ("<layer>.<site>.<parameter>") of a fresh adapter; it holds zeros, or `neutral` where that is
        not 0. `shapes`: (out, in) of the model's sites."""

    def refresh(self, config: Any, layer: int, site: str, p: Mapping[str, Tensor], base: Tensor, squares: Tensor) -> None:
        """Recompute buffers after parameters changed, in the time of an optimizer step. `base`: the base weight [out, in];
        `squares`: the squared norm of each of its rows, in the compute type. Only if `needs_refresh`."""

    def needs_refresh(self, config: Any) -> bool:
        return False

    # ------------------------------------------------------------------------------------------------------------ files
    def write(self, config: Any, tensors: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(settings, tensors) of the adapter's files from the engine's parameters "layers.<n>.<site>.<parameter>"."""
        return {"peft_type": self.file_type, **peft_settings(config)}, dict(tensors)

    @property
    def file_type(self) -> str:
        return self.peft_type or f"FLEXLLM_{self.config_type.type.upper()}"

    def read(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """The reverse of `write`. ValueError: something in it is not supported or does not fit together."""
        values = {k: v for k, v in settings.items() if k not in COMMON_SETTINGS}
        return peft_config(values), dict(tensors)


class Binding(NamedTuple):
    """The adapters of a kind that a program serves: what is bound to the method's sites in the graph."""

    kind: str
    method: PeftMethod
    features: frozenset[str]
    rank: int = 1  # a forward's graph does not depend on it: the pooled parameters' rows are the batch's business


def peft_methods() -> dict[type[PeftConfig], PeftMethod]:
    """Every method whose class exists, by the type of its settings."""
    return {cls.config_type: _instance(cls) for cls in _below(PeftMethod) if hasattr(cls, "config_type")}  # type: ignore[type-abstract]


def method_of(config: PeftConfig) -> PeftMethod:
    return peft_methods()[type(config)]


@functools.cache
def _instance(cls: type[PeftMethod]) -> PeftMethod:
    return cls()


def _below(cls: type[PeftMethod]) -> Iterator[type[PeftMethod]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)


def uniform_(tensor: Tensor, bound: float, generator: Generator) -> None:
    """Drawn in fp32 whatever the tensor's type, so that a seed means the same adapter."""
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


def refuse(settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """ValueError for the first of these settings that is there and not null, false or empty."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name} is not supported, got {settings[name]!r}")


def module_name(layer: int, linear: str) -> str:
    """Of a linear, as Hugging Face and PEFT name it."""
    block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{linear}"
