"""The HTTP process's side of the engine: starts the engine process, talks to it, and starts it again if it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import count
from typing import Any

import zmq
import zmq.asyncio

from flexllm.config import EngineConfig, SchedulerConfig, shorten_spinning
from flexllm.core import INTERACTIVE, JobEvent, SamplingParams, TokenOutput
from flexllm.server import protocol
from flexllm.server.engine_process import EngineFactory, build_engine, run_engine

logger = logging.getLogger("flexllm.server")

FAILED_STARTS = 3  # in a row; then the engine stays dead
DEATHS_WINDOW = 600.0  # the more deaths within it, the longer the pause before the next start
LONGEST_PAUSE = 30.0
SHUTDOWN_SECONDS = 30.0  # for the engine to write durable state


class EngineState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"
    STOPPED = "stopped"


class EngineUnavailable(RuntimeError):
    """The engine is loading, has died or was stopped."""


class EngineOverloaded(RuntimeError):
    """The engine's queue is full."""


class Generation:
    """The tokens of a group of requests, in the order the engine sampled them. Closing it aborts what is unfinished."""

    def __init__(self, client: EngineClient, request_ids: Sequence[str]) -> None:
        self._client = client
        self._open = set(request_ids)
        self._queue: asyncio.Queue[TokenOutput | EngineUnavailable] = asyncio.Queue()

    def put(self, item: TokenOutput | EngineUnavailable) -> None:
        self._queue.put_nowait(item)

    async def outputs(self) -> AsyncGenerator[TokenOutput, None]:
        """Raises EngineUnavailable if the engine dies first."""
        while self._open:
            item = await self._queue.get()
            if isinstance(item, EngineUnavailable):
                raise item
            if item.request_id not in self._open:  # sampled before the engine read the abort
                continue
            if item.finish_reason is not None or item.error is not None:
                self._open.discard(item.request_id)
                self._client.forget(item.request_id)
            yield item

    def abort(self, request_id: str) -> None:
        """Ends one request of the group, for example at a stop string."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._client.abort(request_id)

    def close(self) -> None:
        for request_id in list(self._open):
            self.abort(request_id)


class EngineClient:
    """Owned by one event loop.

    `on_ready` runs after each start, before requests are let in; `on_loss` after each end of the process; `on_dead`, with
    the reason, when starting it again is of no use.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_ready: Callable[[], Awaitable[None]],
        on_loss: Callable[[], None],
        on_event: Callable[[JobEvent], None],
        on_stats: Callable[[protocol.Stats], None],
        on_dead: Callable[[str], None],
        build: EngineFactory = build_engine,
    ) -> None:
        self._config, self._build = config, build
        self._on_ready, self._on_loss, self._on_event = on_ready, on_loss, on_event
        self._on_stats, self._on_dead = on_stats, on_dead
        self._generations: dict[str, Generation] = {}
        self._replies: dict[int, asyncio.Future[None]] = {}
        self._rpc_ids = count()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaths: list[float] = []
        self._stop_requested = asyncio.Event()
        self.state = EngineState.LOADING
        self.info: protocol.Ready | None = None
        self.progress = protocol.Progress("starting", 0.0)
        self.fatal: protocol.Fatal | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def stop(self) -> None:
        """Has the engine write its durable state and end; kills it after SHUTDOWN_SECONDS."""
        self.state = EngineState.STOPPED
        self._stop_requested.set()
        self._send(protocol.Shutdown())
        if self._supervisor is None:
            return
        _, late = await asyncio.wait({self._supervisor}, timeout=SHUTDOWN_SECONDS)
        if late and self._process is not None:
            logger.error("the engine did not end within %.0f s: killed", SHUTDOWN_SECONDS)
            self._process.kill()
            await asyncio.wait({self._supervisor}, timeout=5)

    # -------------------------------------------------------------------------------------------------------- commands
    async def submit(
        self,
        requests: Sequence[tuple[str, list[int], SamplingParams]],
        *,
        arrival: float,
        adapter: str | None = None,
        priority: str = INTERACTIVE,
    ) -> Generation:
        """Start requests (id, prompt ids, sampling) together: all are accepted or none is left behind.

        Raises ValueError (bad request), EngineOverloaded or EngineUnavailable.
        """
        generation = Generation(self, [request_id for request_id, _, _ in requests])
        for request_id, _, _ in requests:
            self._generations[request_id] = generation
        replies = [
            self.call(
                protocol.AddRequest, id=request_id, prompt_ids=ids, sampling=sampling, arrival=arrival, adapter=adapter, priority=priority
            )
            for request_id, ids, sampling in requests
        ]
        try:
            results = await asyncio.gather(*replies, return_exceptions=True)
            for error in results:
                if error is not None:
                    raise error
        except BaseException:
            generation.close()
            raise
        return generation

    async def call(self, command: type[Any], **fields: Any) -> None:
        """Send a command of `protocol.Rpc` and wait for the answer. Raises as `submit` does."""
        if self.info is None:
            raise EngineUnavailable(f"the engine is {self.state}")
        rpc = next(self._rpc_ids)
        reply = self._replies[rpc] = asyncio.get_running_loop().create_future()
        self._send(command(rpc=rpc, **fields))
        try:
            await reply
        finally:
            self._replies.pop(rpc, None)

    async def reconfigure(self, scheduler: SchedulerConfig) -> None:
        """Other scheduler settings for the engine, and for those that are started after it. Raises as `submit` does."""
        await self.call(protocol.Reconfigure, scheduler=scheduler)
        self._config = replace(self._config, scheduler=scheduler)

    def abort(self, request_id: str) -> None:
        self.forget(request_id)
        self._send(protocol.AbortRequest(request_id))

    def forget(self, request_id: str) -> None:
        self._generations.pop(request_id, None)

    def _send(self, command: protocol.Command) -> None:
        if self._socket is not None:
            # A ZeroMQ socket without a high-water mark takes the message at once; the future only says so.
            self._socket.send(protocol.encode(command))

    # ------------------------------------------------------------------------------------------------ the other process
    async def _supervise(self) -> None:
        failed_starts = 0
        while True:
            self.state = EngineState.LOADING
            await self._run_once()
            failed_starts = 0 if self.info is not None else failed_starts + 1
            message = self.fatal.message if self.fatal else "the engine process ended"
            self._lose(EngineUnavailable(message))
            if self.state is EngineState.STOPPED:
                return
            if failed_starts == FAILED_STARTS or (self.fatal is not None and self.fatal.user_error):
                self.state = EngineState.DEAD
                self._on_dead(message)
                return
            now = time.monotonic()
            self._deaths = [t for t in self._deaths if t > now - DEATHS_WINDOW] + [now]
            pause = min(LONGEST_PAUSE, 2.0 ** (len(self._deaths) - 1) - 1)
            logger.error("the engine process died (%s); it starts again in %.0f s", message, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_requested.wait(), pause)
            if self.state is EngineState.STOPPED:
                return

    async def _run_once(self) -> None:
        """One life of the engine process, from its start until it has ended and its last message is read."""
        self.fatal, self.progress = None, protocol.Progress("starting", 0.0)
        self.starts += 1
        folder = tempfile.TemporaryDirectory(prefix="flexllm-")  # of the socket's name, until the engine has found it
        with folder, zmq.asyncio.Context() as context:
            address = f"ipc://{folder.name}/engine"
            with context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.set_hwm(0)
                socket.bind(address)
                self._socket = socket
                shorten_spinning()  # the child inherits it
                self._process = multiprocessing.get_context("spawn").Process(
                    target=run_engine, args=(self._config, address, os.getpid(), self._build), name="flexllm-engine"
                )
                self._process.start()
                receiver = asyncio.create_task(self._receive(socket, on_first=folder.cleanup))
                try:
                    await self._process_end()
                    await asyncio.wait({receiver}, timeout=0.2)  # what it said last
                finally:
                    self._socket = None
                    receiver.cancel()
                    await asyncio.wait({receiver})

    async def _process_end(self) -> None:
        assert self._process is not None
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()

    def _lose(self, error: EngineUnavailable) -> None:
        """Everything in flight ends with `error`."""
        self.info = None
        for generation in set(self._generations.values()):
            generation.put(error)
        self._generations.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
        self._on_loss()

    async def _receive(self, socket: zmq.asyncio.Socket, on_first: Callable[[], None]) -> None:
        """`on_first` is called when the first message is here."""
        await socket.poll()
        on_first()
        while True:
            message = protocol.decode_message(await socket.recv())
            try:
                self._dispatch(message)
            except Exception:
                logger.exception("cannot handle %s", type(message).__name__)

    def _dispatch(self, message: protocol.Message) -> None:
        match message:
            case protocol.Outputs():
                for output in message.outputs:
                    if generation := self._generations.get(output.request_id):
                        generation.put(output)
            case protocol.RpcReply():
                self._resolve(message)
            case protocol.Events():
                for event in message.events:
                    self._on_event(event)
            case protocol.Stats():
                self._on_stats(message)
            case protocol.Progress():
                self.progress = message
            case protocol.Ready():
                self.info = message
                task = asyncio.create_task(self._become_ready())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case protocol.Fatal():
                self.fatal = message

    def _resolve(self, message: protocol.RpcReply) -> None:
        reply = self._replies.get(message.rpc)
        if reply is None or reply.done():
            return
        if message.error is None:
            reply.set_result(None)
        else:
            kinds: dict[str, type[Exception]] = {"value": ValueError, "overloaded": EngineOverloaded}
            reply.set_exception(kinds.get(message.kind, RuntimeError)(message.error))

    async def _become_ready(self) -> None:
        with contextlib.suppress(EngineUnavailable):  # it died meanwhile; the supervisor knows
            await self._on_ready()
            if self.info is not None and self.state is EngineState.LOADING:
                self.state = EngineState.READY
