"""The settings of an adapter, one frozen dataclass per method, under the names that PEFT gives them. No torch here.

A new method's settings are found by their `type` as soon as the class exists: nothing is registered by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from flexllm.checks import require

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class PeftConfig:
    """Base of all methods' settings. `target_modules` are the sites it attaches to (model/layer.py)."""

    type: str
    TARGETS: ClassVar[tuple[str, ...]] = LINEARS
    target_modules: tuple[str, ...]

    def __new__(cls, *_args: Any, **_settings: Any) -> PeftConfig:
        config = super().__new__(cls)
        object.__setattr__(config, "type", cls.type)  # in the instance too, for serializers that look there alone
        return config

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the adapter puts before every prompt."""
        return 0

    @property
    def dropout(self) -> float:
        return 0.0

    @property
    def tensors_depend_on(self) -> dict[str, Any]:
        """The settings that an adapter's tensors mean something with; dropout is a matter of training alone."""
        return {k: v for k, v in peft_settings(self).items() if not k.endswith("dropout")}

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that it adapts."""
        return tuple(range(num_layers))

    def _check_targets(self) -> None:
        """In the model's order, each known; ValueError otherwise."""
        targets = tuple(self.target_modules)
        bad = [t for t in targets if t not in self.TARGETS]
        require(bool(targets) and not bad, "target_modules", f"some of {', '.join(self.TARGETS)}", list(targets))
        object.__setattr__(self, "target_modules", tuple(t for t in self.TARGETS if t in targets))


def peft_types() -> dict[str, type[PeftConfig]]:
    """Settings classes by `type`."""

    def below(cls: type[PeftConfig]) -> Iterator[type[PeftConfig]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    return {c.type: c for c in below(PeftConfig) if is_dataclass(c)}


def peft_config(values: Mapping[str, Any]) -> PeftConfig:
    """Settings from plain values, `type` among them (default "lora"). ValueError names an unknown type or key."""
    given = dict(values)
    types = peft_types()
    kind = given.pop("type", None) or "lora"
    require(kind in types, "peft.type", f"one of {', '.join(sorted(types))}", kind)
    known = [f.name for f in fields(types[kind]) if f.init]  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting of {kind!r}; those are {', '.join(known)}")
    for f in fields(types[kind]):  # type: ignore[arg-type]
        if f.name in given:
            _check_type(f.name, getattr(types[kind], f.name, {}), given[f.name])
    return types[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _check_type(name: str, default: Any, value: Any) -> None:
    """Whether a plain value is of its default's type; ValueError otherwise."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match default:
        case bool():
            require(isinstance(value, bool), name, "true or false", value)
        case int():
            require(number and isinstance(value, int), name, "an integer", value)
        case float():
            require(number and math.isfinite(value), name, "a number", value)
        case str():
            require(isinstance(value, str), name, "a string", value)
        case tuple():
            require(isinstance(value, list | tuple) and all(isinstance(v, str) for v in value), name, "a list of strings", value)
        case None:
            integers = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
            require(value is None or integers, name, "a list of integers", value)
        case _:
            numbers = isinstance(value, Mapping) and all(isinstance(v, int | float) for v in value.values())
            require(numbers, name, "an object of numbers", value)


def peft_settings(config: PeftConfig) -> dict[str, Any]:
    """The plain values that `peft_config` takes back."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value

    return {f.name: plain(getattr(config, f.name)) for f in fields(config)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoraConfig(PeftConfig):
    """y + scale * B(A x). `scale` is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

    `use_dora` also trains the norm of each output's merged weight (DoRA). `rank_pattern`, `alpha_pattern`: module names, or
    regular expressions that match their end, with another rank or alpha there. `lora_dropout` acts in training alone.
    """

    type: str = field(default="lora", init=False)

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEARS
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.r, int) and 1 <= self.r <= 512, "r", "an integer between 1 and 512", self.r)
        require(self.lora_alpha > 0, "lora_alpha", "positive", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        bad_ranks = {k: v for k, v in self.rank_pattern.items() if not (isinstance(v, int) and 1 <= v <= 512)}
        require(not bad_ranks, "rank_pattern", "integers between 1 and 512", bad_ranks)
        bad_alphas = {k: v for k, v in self.alpha_pattern.items() if not v > 0}
        require(not bad_alphas, "alpha_pattern", "positive numbers", bad_alphas)
        if self.layers_to_transform is not None:
            chosen = self.layers_to_transform
            require(bool(chosen) and min(chosen) >= 0, "layers_to_transform", "layer numbers", list(chosen))
            object.__setattr__(self, "layers_to_transform", tuple(sorted(set(chosen))))
        self._check_targets()

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def max_rank(self) -> int:
        return max([self.r, *self.rank_pattern.values()])

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(i for i in range(num_layers) if self.layers_to_transform is None or i in self.layers_to_transform)

    def rank_at(self, module: str) -> int:
        """Of a module by its full name, such as `model.layers.3.self_attn.q_proj`."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale_at(self, module: str) -> float:
        r = self.rank_at(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (r**0.5 if self.use_rslora else r)

    @property
    def scale(self) -> float:
        """Where no pattern says otherwise."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As PEFT's get_pattern_key: the first pattern that matches the end of the module's name, at a dot."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


@dataclass(frozen=True)
class Ia3Config(PeftConfig):
    """(IA)^3: outputs of the targets are scaled elementwise; of `feedforward_modules` among them, the inputs."""

    type: str = field(default="ia3", init=False)
    FEEDFORWARD: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")  # linears that share their input with no other

    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        self._check_targets()
        allowed = [t for t in self.FEEDFORWARD if t in self.target_modules]
        bad = [t for t in self.feedforward_modules if t not in allowed]
        require(not bad, "feedforward_modules", f"targets among {', '.join(self.FEEDFORWARD)}", list(self.feedforward_modules))
        object.__setattr__(self, "feedforward_modules", tuple(t for t in allowed if t in self.feedforward_modules))


@dataclass(frozen=True)
class VeraConfig(PeftConfig):
    """y + b * (B (d * (A x))): A and B random, frozen and shared by all layers; the vectors d and b are trained."""

    type: str = field(default="vera", init=False)

    r: int = 256
    target_modules: tuple[str, ...] = LINEARS
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    projection_prng_key: int = 0

    def __post_init__(self) -> None:
        require(isinstance(self.r, int) and 1 <= self.r <= 1024, "r", "an integer between 1 and 1024", self.r)
        require(0 <= self.vera_dropout < 1, "vera_dropout", "in [0, 1)", self.vera_dropout)
        self._check_targets()

    @property
    def dropout(self) -> float:
        return self.vera_dropout


@dataclass(frozen=True)
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters as AdapterHub has them: up(f(down(z))) on the output z of a sublayer, added to it (serial), or on the
    sublayer's input (`is_parallel`). `target_modules`: after which sublayers; `bottleneck`: hidden size."""

    type: str = field(default="bottleneck", init=False)
    TARGETS: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("relu", "silu")

    bottleneck: int = 64
    target_modules: tuple[str, ...] = ("attention", "mlp")
    non_linearity: str = "relu"
    is_parallel: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        ok = isinstance(self.bottleneck, int) and 1 <= self.bottleneck <= 1024
        require(ok, "bottleneck", "an integer between 1 and 1024", self.bottleneck)
        require(self.non_linearity in self.ACTIVATIONS, "non_linearity", f"one of {', '.join(self.ACTIVATIONS)}", self.non_linearity)
        require(self.scaling > 0, "scaling", "positive", self.scaling)
        self._check_targets()


class _VirtualTokens(PeftConfig):
    def _check_tokens(self) -> None:
        tokens = self.num_virtual_tokens
        require(isinstance(tokens, int) and 1 <= tokens <= 1024, "num_virtual_tokens", "an integer between 1 and 1024", tokens)
        self._check_targets()


@dataclass(frozen=True)
class PrefixConfig(_VirtualTokens):
    """Trained keys and values of virtual tokens before the prompt, in every layer."""

    type: str = field(default="prefix_tuning", init=False)
    TARGETS: ClassVar[tuple[str, ...]] = ("key", "value")

    num_virtual_tokens: int = 20  # type: ignore[misc]
    target_modules: tuple[str, ...] = ("key", "value")

    def __post_init__(self) -> None:
        self._check_tokens()


@dataclass(frozen=True)
class PromptConfig(_VirtualTokens):
    """Trained embeddings of virtual tokens before the prompt."""

    type: str = field(default="prompt_tuning", init=False)
    TARGETS: ClassVar[tuple[str, ...]] = ("embedding",)

    num_virtual_tokens: int = 20  # type: ignore[misc]
    target_modules: tuple[str, ...] = ("embedding",)

    def __post_init__(self) -> None:
        self._check_tokens()

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (0,)
