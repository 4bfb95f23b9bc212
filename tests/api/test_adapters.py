"""vLLM's endpoints that load and unload adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import CHAT, MODEL, Server, fake_settings, serve


def load(http: httpx.Client, name: str, path: str, **more: object) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def test_load_use_unload(http: httpx.Client, adapter_dir: Path) -> None:
    assert load(http, "mine", str(adapter_dir / "good")).status_code == 200
    card = http.get("/v1/models/mine").json()
    assert (card["root"], card["parent"]) == (str(adapter_dir / "good"), MODEL)
    assert http.post("/v1/chat/completions", json={"model": "mine", "messages": CHAT}).json()["model"] == "mine"
    assert load(http, "mine", "better").status_code == 400
    assert load(http, "mine", "better", load_inplace=True).status_code == 200
    assert http.get("/v1/models/mine").json()["root"] == str(adapter_dir / "better")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 404
    assert http.get("/v1/models/mine").status_code == 404
    assert (adapter_dir / "better").exists()  # a user's files stay


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("x", "..", 403),
        ("x", "../../etc", 403),
        ("x", "/etc", 403),
        ("x", ".", 403),
        ("x", "a\0b", 400),
        ("x", "missing", 404),
        ("x", "empty", 400),
        (MODEL, "good", 400),
        ("", "good", 400),
    ],
)
def test_bad_loads(http: httpx.Client, name: str, path: str, status: int) -> None:
    response = load(http, name, path)
    assert response.status_code == status, response.text
    assert "error" in response.json()
    assert http.get("/v1/models/x").status_code == 404


@pytest.fixture
def closed(tiny_llama: Path, tmp_path: Path) -> Iterator[Server]:
    with serve(fake_settings(tiny_llama, tmp_path)) as running:
        yield running


def test_loading_is_off_unless_enabled(closed: Server, adapter_dir: Path) -> None:
    with closed.http() as http:
        assert load(http, "mine", str(adapter_dir / "good")).status_code == 403
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 403
