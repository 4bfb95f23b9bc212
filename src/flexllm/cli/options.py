"""Arguments that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flexllm.peft.config import PeftConfig, peft_config, peft_types

DEFAULT_MODEL = "default"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='Hugging Face folder or id, .gguf file, or "default" (the default).', show_default=False)
]
Adapter = Annotated[Path | None, typer.Option(help="Folder of an adapter in PEFT's format.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64; auto is bfloat16 where the device has it.")]
Quantization = Annotated[
    str | None, typer.Option(help="Hold the decoder's linears as q8_0, q4_0 or q4_1. \\[default: as --dtype]", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the engine. \\[default: one per core]", show_default=False)]
MaxModelLen = Annotated[int | None, typer.Option(help="Context limit in tokens. \\[default: the model's]", show_default=False)]

MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling: keep the likeliest tokens up to this mass.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
PeftType = Annotated[str, typer.Option(help=f"Method: {', '.join(sorted(peft_types()))}.")]
Rank = Annotated[int | None, typer.Option("--r", help="Rank, of methods that have one. \\[default: the method's]", show_default=False)]
TargetModules = Annotated[
    str | None, typer.Option(help="Modules to adapt, separated by commas. \\[default: the method's]", show_default=False)
]
PeftSettings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the method, under PEFT's name; may be repeated.")
]

Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def peft_from_options(kind: str, target_modules: str | None, settings: list[str] | None, **given: Any) -> PeftConfig:
    """The method's settings; `given`: those with an option of their own, None where it was not used."""
    values: dict[str, Any] = {"type": kind} | {name: value for name, value in given.items() if value is not None}
    if target_modules is not None:
        values["target_modules"] = tuple(t.strip() for t in target_modules.split(",") if t.strip())
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {setting!r}")
        values[name] = _value(text)
    return peft_config(values)


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def model_ref(model: str) -> str | None:
    """What the configuration calls a model; None is the default one."""
    return None if model == DEFAULT_MODEL else model
