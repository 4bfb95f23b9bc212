"""One page of everything measured: `out/report/report.html`, which refers to nothing outside of it, and its pictures beside it.

Takes the results that are there, of full runs first, else of quick ones, and says which; what is missing is "not run".
Each section has its command, commit and machine, and beside each figure its bound or target (report_sections.py).
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import QUICK_RESULTS, RESULTS, ROOT, log
from report_blocks import Cell, Picture, Section, Table
from report_sections import SECTIONS

STYLE = """
:root { color-scheme: light dark; --quiet: #666; --line: #ddd; --good: #00684a; --bad: #a83a00 }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; --line: #444; --good: #4fd1a5; --bad: #ff9a62 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2.5em; border-top: 1px solid var(--line); padding-top: 1em }
h3 { font-size: 1em; margin-bottom: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .7em 0; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em .2em 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: normal; vertical-align: bottom }
th { color: var(--quiet) } td:first-child, th:first-child { text-align: left }
img { width: 100%; background: #fff; border-radius: 4px } figure { margin: 1.2em 0 }
.from, figcaption, .note { color: var(--quiet); font-size: .9em } code { overflow-wrap: anywhere }
.met { color: var(--good) } .missed { color: var(--bad) }
"""


def load_results(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The result of each benchmark by name, from the first folder that has it. A file that is no result is passed over."""
    results: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                found = json.loads(path.read_text())
            except ValueError:
                log(f"{path} is not JSON: left out")
                continue
            if isinstance(found, dict) and found.get("benchmark") == path.stem:  # also leaves out variants, such as coserve_x.json
                results.setdefault(path.stem, found)
    return results


def build(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any] | None, Section | None]]:
    """Name, result and section of every benchmark in the order of the page. Those that were not run have neither, and a result
    of an earlier form of its benchmark, without what the section needs, has no section.
    """
    found: list[tuple[str, dict[str, Any] | None, Section | None]] = []
    for name, make in SECTIONS.items():
        section = None
        if name in results:
            try:
                section = make(results[name])
            except (AttributeError, KeyError, IndexError, TypeError) as error:
                log(f"{name}: its result is not of today's form ({error!r})")
        found.append((name, results.get(name), section))
    return found


def page(sections: Sequence[tuple[str, dict[str, Any] | None, Section | None]]) -> str:
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>FlexLLM, measured</title><style>{STYLE}</style></head><body><h1>FlexLLM, measured</h1>",
        '<p>Beside a figure stands its target or its bound. <span class="met">✓</span> target met, <span class="missed">✗ missed</span>.',
        "benchmarks/README.md says how each is measured.</p>",
    ]
    for name, result, section in sections:
        if result is None or section is None:
            why = (
                "Not run" if result is None else f"The result of commit {result.get('commit', 'unknown')} is of an earlier form; run again"
            )
            parts.append(f"<h2>{name}</h2><p class=note>{html.escape(why)}: <code>python benchmarks/{name}.py</code></p>")
            continue
        parts += [f"<h2>{html.escape(section.title)}</h2>", _origin(result), f"<p>{html.escape(section.says)}</p>"]
        parts += [_table(block) if isinstance(block, Table) else _figure(block) for block in section.blocks]
    return "\n".join([*parts, "</body></html>\n"])


def _origin(result: dict[str, Any]) -> str:
    machine = result.get("machine", {})
    where = f"{machine.get('cpu', 'unknown machine')}, {machine.get('cores', '?')} cores" + (f", {g}" if (g := machine.get("gpu")) else "")
    where += f" ({', '.join(isa)})" if (isa := machine.get("isa")) else ""
    run = "quick run" if result.get("quick") else "full run"
    said = f"commit {result.get('commit', 'unknown')}, {result.get('date', '')}; {where}; {run}"
    return f"<p class=from><code>{html.escape(result.get('command', ''))}</code><br>{html.escape(said)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in table.headings)
    rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    title = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
    return f"{title}<div class=wide><table><tr>{head}</tr>\n{rows}</table></div>{note}"


def _cell(value: str | Cell) -> str:
    if isinstance(value, str) or value.met is None:
        return f"<td>{html.escape(value if isinstance(value, str) else value.text)}</td>"
    kind, mark = ("met", "✓") if value.met else ("missed", "✗")
    return f'<td class="{kind}">{html.escape(value.text)} {mark}</td>'


def _figure(picture: Picture) -> str:
    data, caption = base64.b64encode(picture.png).decode(), html.escape(picture.caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def write(folders: Sequence[Path], out: Path) -> None:
    sections = build(load_results(folders))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):  # of results that are no longer there
        old.unlink()
    for _, _, section in sections:
        for block in section.blocks if section else ():
            if isinstance(block, Picture):
                (out / f"{block.name}.png").write_bytes(block.png)
    (out / "report.html").write_text(page(sections), encoding="utf-8")
    missing = [name for name, result, _ in sections if result is None]
    log(f"wrote {out / 'report.html'}" + (f"; not run: {', '.join(missing)}" if missing else ""))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="DIR",
        default=[RESULTS, QUICK_RESULTS],
        help="folders of results, the preferred one first",
    )
    options.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "out" / "report")
    args = options.parse_args()
    write(args.results, args.out)


if __name__ == "__main__":
    main()
