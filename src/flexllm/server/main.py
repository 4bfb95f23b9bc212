"""`run_server`: what `flexllm serve` calls."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from flexllm.config import EngineConfig
from flexllm.server.app import create_app
from flexllm.server.context import Settings

DRAIN_SECONDS = 30  # for requests in flight at shutdown; then they are cut

logger = logging.getLogger("flexllm.server")


def run_server(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    enable_adapter_loading: bool = False,
    adapter_dir: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain: requests in flight finish, jobs become durable. `port` 0 picks a free one.

    Raises ValueError when it cannot listen, when its state folder has another server, or when the model or the settings do not work.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    settings = Settings(config, api_key, served_model_name, enable_adapter_loading, adapter_dir)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    failures: list[str] = []

    def ready() -> None:
        logger.info("serving %s at %s/v1", settings.model_name, url)

    def fail(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    app = create_app(settings, on_ready=ready, on_failure=fail)
    server = DrainingServer(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS))
    logger.info("loading %s; listening on %s", settings.model_name, url)
    # uvicorn raises the signal that ended it once more when all is done; ending was the point, so it ends nothing else.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with _owned(config.state_dir), contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
    if failures:
        raise ValueError(failures[0])


@contextlib.contextmanager
def _owned(state_dir: Path) -> Iterator[None]:
    """One server per state folder: two would run the same jobs. The lock goes with its process, however that ends."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{state_dir} is in use by another server; choose another folder with --state-dir") from None
        yield


class DrainingServer(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From the first signal on, new requests are sent elsewhere (503)."""
        context = getattr(self.config.app.state, "context", None)  # type: ignore[union-attr]
        if context is not None:
            context.draining = True
        super().handle_exit(sig, frame)
