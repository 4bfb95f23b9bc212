"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "default"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='Hugging Face folder or id, .gguf file, or "default" (the default).', show_default=False)
]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter in PEFT's format.")]
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
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def model_ref(model: str) -> str | None:
    """What the configuration calls a model; None is the default one."""
    return None if model == DEFAULT_MODEL else model
