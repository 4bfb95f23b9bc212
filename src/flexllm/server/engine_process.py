"""The engine process: one `Engine`, one ZeroMQ socket, one loop. No request, job or adapter can end it."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from flexllm.config import EngineConfig, JobSpec, SchedulerConfig
from flexllm.core import JobEvent, Request, RequestStatus, StepResult
from flexllm.server import protocol

logger = logging.getLogger("flexllm.engine")

IDLE_POLL_MS = 100  # how long an idle engine sleeps before it looks at its parent again
EMPTY_STEP_SECONDS = 2e-4  # an iteration shorter than this had nothing to run
STATS_SECONDS = 0.25
IDLE_STATS_SECONDS = 1.0

ProgressCallback = Callable[[str, float], None]


class EngineLike(Protocol):
    """What this process needs of `flexllm.engine.Engine` (tests drive it with a fake)."""

    max_model_len: int
    model_config: Any

    @property
    def has_work(self) -> bool: ...
    def add_request(self, request: Request) -> None: ...
    def abort_request(self, request_id: str) -> None: ...
    def register_adapter(self, name: str, path: str) -> None: ...
    def unregister_adapter(self, name: str) -> None: ...
    def add_job(self, spec: JobSpec) -> Any: ...
    def pause_job(self, job_id: str) -> None: ...
    def resume_job(self, job_id: str) -> None: ...
    def cancel_job(self, job_id: str) -> None: ...
    def reconfigure(self, config: SchedulerConfig) -> None: ...
    def step(self, waited: Callable[[], float] = ...) -> StepResult: ...
    def stats(self) -> dict[str, Any]: ...
    def shutdown(self) -> tuple[JobEvent, ...]: ...


EngineFactory = Callable[[EngineConfig, ProgressCallback], EngineLike]


def build_engine(config: EngineConfig, progress: ProgressCallback) -> EngineLike:
    from flexllm.engine import Engine  # loads torch: only in the engine process

    return Engine(config, progress)


def run_engine(config: EngineConfig, address: str, parent_pid: int, build: EngineFactory = build_engine) -> None:
    """Main of the spawned process. Ends on `Shutdown` or SIGTERM, durable state written, and when its parent is gone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches both processes; the server decides
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.set_hwm(0)
    socket.connect(address)
    loop = EngineLoop(socket, parent_pid)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    try:
        engine = build(config, lambda stage, fraction: loop.send(protocol.Progress(stage, fraction)))
        loop.run(engine)
    except Exception as error:
        logger.exception("the engine process ends")
        user_error = isinstance(error, ValueError | OSError) and not loop.ready
        loop.send(protocol.Fatal(str(error) if user_error else f"{type(error).__name__}: {error}", user_error))
        raise SystemExit(1) from None
    finally:
        socket.close()
        context.term()


class EngineLoop:
    """Commands in, iterations run, outputs out."""

    def __init__(self, socket: zmq.Socket[bytes], parent_pid: int) -> None:
        self._socket, self._parent_pid = socket, parent_pid
        self._engine: EngineLike
        self._stopping = False
        self._progressing = False
        self._steps: list[tuple[str, float]] = []
        self._waiting: dict[str, Request] = {}  # those the engine has not run yet
        self._queue_seconds: list[float] = []
        self._reported = 0.0
        self._came: float | None = None  # when the first command of those that wait was seen
        self.ready = False

    def stop(self) -> None:
        self._stopping = True

    def send(self, message: protocol.Message) -> None:
        self._socket.send(protocol.encode(message))

    def run(self, engine: EngineLike) -> None:
        self._engine = engine
        self.send(protocol.Ready(engine.max_model_len, engine.model_config.vocab_size))
        self.ready = True
        while not self._stopping:
            if os.getppid() != self._parent_pid:
                # Steps that nobody was told of must not become durable: the next server's record of the job would lack them.
                logger.error("the server is gone")
                return
            self._receive()
            self._step()
            self._report()
        if events := engine.shutdown():
            self.send(protocol.Events(events))

    # ------------------------------------------------------------------------------------------------------- commands
    def _receive(self) -> None:
        """Handle every waiting command; wait for one only when there is nothing else to do."""
        timeout = 0 if self._progressing else 1 if self._engine.has_work else IDLE_POLL_MS
        while self._socket.poll(timeout):
            self._handle(protocol.decode_command(self._socket.recv()))
            timeout = 0

    def _handle(self, command: protocol.Command) -> None:
        if isinstance(command, protocol.Shutdown):
            self.stop()
        elif isinstance(command, protocol.AbortRequest):
            self._waiting.pop(command.id, None)
            self._engine.abort_request(command.id)
        else:
            self.send(self._answer(command))

    def _answer(self, command: protocol.Rpc) -> protocol.RpcReply:
        try:
            self._execute(command)
        except ValueError as error:
            return protocol.RpcReply(command.rpc, str(error))
        except RuntimeError as error:  # no room, now: a full queue, every adapter slot in use
            logger.warning("%s refused: %s", type(command).__name__, error)
            return protocol.RpcReply(command.rpc, str(error), "overloaded")
        except Exception as error:
            logger.exception("%s failed", type(command).__name__)
            return protocol.RpcReply(command.rpc, f"{type(error).__name__}: {error}", "internal")
        return protocol.RpcReply(command.rpc)

    def _execute(self, command: protocol.Rpc) -> None:
        engine = self._engine
        match command:
            case protocol.AddRequest():
                request = Request(
                    id=command.id,
                    prompt_ids=command.prompt_ids,
                    sampling=command.sampling,
                    arrival=command.arrival,
                    adapter=command.adapter,
                    priority=command.priority,
                )
                engine.add_request(request)
                self._waiting[request.id] = request
            case protocol.AddJob():
                engine.add_job(command.spec)
            case protocol.PauseJob():
                engine.pause_job(command.job_id)
            case protocol.ResumeJob():
                engine.resume_job(command.job_id)
            case protocol.CancelJob():
                engine.cancel_job(command.job_id)
            case protocol.RegisterAdapter():
                engine.register_adapter(command.name, command.path)
            case protocol.UnregisterAdapter():
                engine.unregister_adapter(command.name)
            case protocol.Reconfigure():
                engine.reconfigure(command.scheduler)

    # ------------------------------------------------------------------------------------------------------ iterations
    def _step(self) -> None:
        self._came = None
        result = self._engine.step(self._waited)
        self._progressing = bool(result.outputs or result.events) or result.seconds >= EMPTY_STEP_SECONDS
        if result.outputs:
            self.send(protocol.Outputs(result.outputs))
        if result.events:
            self.send(protocol.Events(result.events))
        if kind := step_kind(self._engine.stats()):
            self._steps.append((kind, result.seconds))
        begun = [r for r in self._waiting.values() if r.status is not RequestStatus.WAITING]
        for request in begun:
            del self._waiting[request.id]
            self._queue_seconds.append(result.start - request.arrival)

    def _waited(self) -> float:
        """Seconds since a command came while an iteration runs; 0 if none did."""
        if self._came is None and self._socket.poll(0):
            self._came = time.monotonic() - 1e-6
        return 0.0 if self._came is None else time.monotonic() - self._came

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported >= (STATS_SECONDS if self._engine.has_work else IDLE_STATS_SECONDS):
            self._reported = now
            self.send(protocol.Stats(self._engine.stats(), tuple(self._steps), tuple(self._queue_seconds)))
            self._steps.clear()
            self._queue_seconds.clear()


def step_kind(stats: dict[str, Any]) -> str:
    """What the last iteration was made of (`protocol.STEP_KINDS`); empty if it had nothing to do."""
    rows = stats.get("step", {})
    inference = rows.get("decode", 0) + rows.get("prefill", 0) > 0
    finetune = rows.get("window", 0) + rows.get("backward", 0) > 0
    return "mixed" if inference and finetune else "finetune" if finetune else "inference" if inference else ""
