"""What a section of the report is made of, and how its figures are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure that has a target."""

    text: str
    met: bool | None  # None: there is no figure to hold to it


@dataclass(frozen=True, slots=True)
class Table:
    headings: list[str]
    rows: list[list[str | Cell]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    name: str  # of its file
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    says: str
    blocks: list[Table | Picture]


# ------------------------------------------------------------------------------------------------- how figures are written
def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones; thousands with commas; an em dash for no figure."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} x"


def at_least(value: float | None, target: float, write: Callable[[float | None], str]) -> Cell:
    return Cell(write(value), None if value is None else value >= target)
