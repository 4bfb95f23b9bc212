"""How a setting is refused."""

from __future__ import annotations

from typing import Any


def require(ok: bool, name: str, want: str, got: Any) -> None:
    """ValueError that names the setting, what it takes and what it got."""
    if not ok:
        raise ValueError(f"{name} must be {want}, got {got!r}")
