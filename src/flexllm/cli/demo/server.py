"""The demo's own server: a child process on a free port."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from flexllm.config import SLO

STOP_SECONDS = 30.0
LOG_TAIL = 15  # lines shown when the server fails


@dataclass(frozen=True, slots=True)
class DemoServer:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    async def wait_ready(self, seconds: float) -> None:
        """Wait until /health answers 200. RuntimeError with the end of the log if it does not."""
        async with httpx.AsyncClient(timeout=5.0) as client:
            try:
                async with asyncio.timeout(seconds):
                    while self.process.poll() is None:
                        try:
                            if (await client.get(f"{self.url}/health")).status_code == httpx.codes.OK:
                                return
                        except httpx.TransportError:
                            pass  # not listening yet
                        await asyncio.sleep(0.25)
            except TimeoutError:
                raise RuntimeError(f"the server was not ready after {seconds:.0f} s: {self.tail()}") from None
        raise RuntimeError(f"the server ended with status {self.process.returncode}: {self.tail()}")

    def tail(self) -> str:
        return " / ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:])


@contextmanager
def running_server(model: str, slo: SLO, state_dir: Path, threads: int | None) -> Iterator[DemoServer]:
    """Start `flexllm serve`; stop it (SIGTERM, then SIGKILL) on the way out."""
    port, log = _free_port(), state_dir / "server.log"
    command = [sys.executable, "-m", "flexllm.cli.main", "serve", model, "--port", str(port), "--state-dir", str(state_dir)]
    command += ["--slo-ttft", str(slo.ttft), "--slo-tpot", str(slo.tpot)]
    command += ["--threads", str(threads)] if threads else []
    with log.open("wb") as output:  # a session of its own: Ctrl-C reaches the demo, which then stops the server in order
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield DemoServer(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
