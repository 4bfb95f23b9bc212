"""Messages between the HTTP process and the engine process: msgspec structs, msgpack-encoded, over one ZeroMQ pair.

A command that can be refused carries an `rpc` id and is answered by exactly one `RpcReply` with that id. Everything the
engine says for itself (`Outputs`, `Events`, `Stats`, ...) goes out in the order it happened, on the same socket as the
replies; so a client that has seen the reply to `PauseJob` has seen every event before the pause.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flexllm.config import JobSpec, SchedulerConfig
from flexllm.core import INTERACTIVE, JobEvent, SamplingParams, TokenOutput
from flexllm.peft.config import PeftConfig, peft_config


# ------------------------------------------------------------------------------------------------------ server -> engine
class AddRequest(msgspec.Struct, tag=True, frozen=True):
    """`arrival` is `time.monotonic()`, which the processes of one machine share."""

    rpc: int
    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    arrival: float
    adapter: str | None = None
    priority: str = INTERACTIVE


class AbortRequest(msgspec.Struct, tag=True, frozen=True):
    id: str


class AddJob(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    spec: JobSpec


class PauseJob(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    job_id: str


class ResumeJob(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    job_id: str


class CancelJob(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    job_id: str


class RegisterAdapter(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    name: str
    path: str


class UnregisterAdapter(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    name: str


class Reconfigure(msgspec.Struct, tag=True, frozen=True):
    rpc: int
    scheduler: SchedulerConfig


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Write durable state, then end."""


Rpc = AddRequest | AddJob | PauseJob | ResumeJob | CancelJob | RegisterAdapter | UnregisterAdapter | Reconfigure
Command = Rpc | AbortRequest | Shutdown


# ------------------------------------------------------------------------------------------------------ engine -> server
class Progress(msgspec.Struct, tag=True, frozen=True):
    """Loading and profiling, before `Ready`. `fraction` is in [0, 1]."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    max_model_len: int
    vocab_size: int


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine process is about to end. `user_error`: the configuration is at fault; trying again is of no use."""

    message: str
    user_error: bool = False


class RpcReply(msgspec.Struct, tag=True, frozen=True):
    """`error` is None, or what the engine refused and why; `kind` is `value` | `overloaded` | `internal`."""

    rpc: int
    error: str | None = None
    kind: str = "value"


class Outputs(msgspec.Struct, tag=True, frozen=True):
    outputs: tuple[TokenOutput, ...]


class Events(msgspec.Struct, tag=True, frozen=True):
    events: tuple[JobEvent, ...]


STEP_KINDS = ("inference", "finetune", "mixed")  # of an iteration, by what it was made of


class Stats(msgspec.Struct, tag=True, frozen=True):
    """`engine` is `Engine.stats()`. The rest is what happened since the last Stats message: the (kind, seconds) of every
    iteration, and how long each request that was first run had waited.
    """

    engine: dict[str, Any]
    steps: tuple[tuple[str, float], ...] = ()
    queue_seconds: tuple[float, ...] = ()


Message = Progress | Ready | Fatal | RpcReply | Outputs | Events | Stats


def encode(message: Command | Message) -> bytes:
    return msgspec.msgpack.encode(message, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """numpy's and torch's scalars, which statistics and losses may be."""
    if hasattr(value, "item"):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} cannot be sent")


def peft_from_plain(wanted: type, value: Any) -> Any:
    """msgspec's hook for a PEFT method's settings, whose class their `type` names."""
    if wanted is PeftConfig:
        return peft_config(value)
    raise NotImplementedError(f"{wanted.__name__} cannot be received")


def decode_command(data: bytes) -> Command:
    return msgspec.msgpack.decode(data, type=Command, dec_hook=peft_from_plain)


def decode_message(data: bytes) -> Message:
    return msgspec.msgpack.decode(data, type=Message)
