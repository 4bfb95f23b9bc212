"""From the body of a job request to the settings it trains with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexllm.config import FinetuneConfig
from flexllm.peft.config import PeftConfig, peft_config, peft_settings
from flexllm.server.errors import bad_request
from flexllm.server.wire import BASE_LEARNING_RATE, Hyperparameters, JobRequest, Peft, TrainingOptions

WIRE_NAMES = {"num_epochs": "n_epochs"}  # where config and wire spell a field differently
AUTO_BATCH_SIZE = 4
AUTO_EXAMPLES = 300  # how many examples `n_epochs="auto"` lets a job see at least, in at most AUTO_EPOCHS[1] epochs
AUTO_EPOCHS = (3, 10)


@dataclass(frozen=True)
class JobOptions:
    finetune: FinetuneConfig
    peft: PeftConfig
    learning_rate_multiplier: float


def resolve_options(body: JobRequest, *, examples: int, seed: int, max_model_len: int | None, continued: PeftConfig | None) -> JobOptions:
    """The settings of a job, every `auto` resolved. `continued` is the shape of the adapter it goes on from, if it does.

    Raises a 400 that names the field.
    """
    given, peft_given = _merge(body)
    epochs = given.pop("n_epochs", "auto")
    batch_size = given.pop("batch_size", "auto")
    multiplier = given.pop("learning_rate_multiplier", "auto")
    if epochs == "auto":
        epochs = min(AUTO_EPOCHS[1], max(AUTO_EPOCHS[0], math.ceil(AUTO_EXAMPLES / max(1, examples))))
    if batch_size == "auto":
        batch_size = min(AUTO_BATCH_SIZE, max(1, examples))
    if multiplier == "auto":
        multiplier = given.get("learning_rate", BASE_LEARNING_RATE) / BASE_LEARNING_RATE
    elif "learning_rate" in given:
        raise bad_request("give either learning_rate or learning_rate_multiplier", "learning_rate")
    if multiplier <= 0:
        raise bad_request(f"learning_rate_multiplier must be positive, got {multiplier}", "learning_rate_multiplier")
    given.setdefault("learning_rate", multiplier * BASE_LEARNING_RATE)
    if max_model_len is not None:
        length = given.setdefault("max_seq_length", min(FinetuneConfig.max_seq_length, max_model_len))
        if length > max_model_len:
            raise bad_request(f"max_seq_length must be at most the model's context, {max_model_len}, got {length}", "max_seq_length")
    try:
        finetune = FinetuneConfig(num_epochs=epochs, batch_size=batch_size, seed=seed, **given)
    except ValueError as error:
        name = str(error).split()[0]
        wire_name = WIRE_NAMES.get(name, name)
        raise bad_request(str(error).replace(name, wire_name, 1), wire_name) from None
    try:
        peft = peft_config((peft_settings(continued) if continued else {}) | peft_given)
    except ValueError as error:
        raise bad_request(str(error), f"peft.{str(error).split()[0].removeprefix('peft.')}") from None
    if continued is not None and peft.tensors_depend_on != continued.tensors_depend_on:
        raise bad_request("peft must match the fine-tuned model that the job continues; leave it out", "peft")
    return JobOptions(finetune, peft, multiplier)


def show_method(options: JobOptions) -> dict[str, Any]:
    """`method` of a job, as `JobRequest.method` takes it, with the values used."""
    finetune, peft = options.finetune, options.peft
    names = [name for name in TrainingOptions.model_fields if getattr(finetune, name) is not None]
    return {
        "type": "supervised",
        "supervised": {
            "hyperparameters": show_hyperparameters(options)
            | {name: getattr(finetune, name) for name in names if name != "learning_rate"}
            | {"peft": peft_settings(peft)}
        },
    }


def show_hyperparameters(options: JobOptions) -> dict[str, Any]:
    return {
        "n_epochs": options.finetune.num_epochs,
        "batch_size": options.finetune.batch_size,
        "learning_rate_multiplier": options.learning_rate_multiplier,
    }


def _merge(body: JobRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options may stand at the top, in `hyperparameters` (old or new place) and in `peft`, but not twice with two values."""
    supervised = body.method.supervised if body.method else None
    places: list[TrainingOptions | None] = [body, body.hyperparameters, supervised.hyperparameters if supervised else None]
    places += [place.peft for place in places if isinstance(place, JobRequest | Hyperparameters)]
    given: dict[str, Any] = {}
    peft: dict[str, Any] = {}
    for place in places:
        if place is None:
            continue
        _add(given, place.training_options())
        if isinstance(place, Peft):
            _add(peft, place.peft_options())
        if isinstance(place, Hyperparameters):
            numbers = {name: getattr(place, name) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
            _add(given, {name: value for name, value in numbers.items() if value is not None})
    return given, peft


def _add(options: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if options.setdefault(name, value) != value:
            raise bad_request(f"{name} is given twice: {options[name]!r} and {value!r}", name)
