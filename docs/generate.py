"""`python docs/generate.py`: the parts of the documentation that follow from the source, put between their marks.

The command line comes from typer's own documentation of `pared.cli`, the list of decisions from their headings, the
formats of other runtimes from their table.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

from pared.targets.table import TARGETS

_ROWS, _COLUMNS = 4096, 4096  # of the matrix whose bytes are shown

DOCS = Path(__file__).parent
MARKS = r"(<!-- generated: {} -->\n).*?(<!-- end of generated -->)"


def commands() -> str:
    """Every command with its arguments and options."""
    command = [sys.executable, "-m", "typer", "pared.cli", "utils", "docs", "--name", "pared"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    sections = text.split("\n## ")[1:]  # the first is the page's title and a list of what follows
    return "\n".join(f"## {html.unescape(section).strip()}\n" for section in sections)


def decisions() -> str:
    """A line for each record."""
    rows = []
    for path in sorted(DOCS.glob("decisions/*.md")):
        number, title = re.match(r"# (\d+):? (.*)", path.read_text(encoding="utf-8")).groups()  # type: ignore[union-attr]  # each record has one
        rows.append(f"| {number} | [{title}](../decisions/{path.name}) |")
    return "\n".join(["| record | decision |", "|---|---|", *rows, ""])


def targets() -> str:
    """A line for each runtime: its name, its formats by bits, and what it takes."""
    rows = []
    for target in TARGETS.values():
        formats = [offer for offer in target.offers if not isinstance(offer.grid, str)]
        rates = [8 * offer.nbytes(_ROWS, _COLUMNS) / (_ROWS * _COLUMNS) for offer in formats]
        names = ", ".join(f"{offer.name} ({rate:.3g})" for offer, rate in zip(formats, rates, strict=True))
        roles = {role for offer in formats for role in offer.roles}
        tables = "yes" if "table" in roles else "no"
        rows.append(f"| `{target.name}` | {names} | {tables} |")
    return "\n".join(["| target | formats (bits per weight) | embedding and head, too |", "|---|---|---|", *rows, ""])


PARTS = {
    "commands": (DOCS / "reference" / "cli.md", commands),
    "targets": (DOCS / "how-to" / "which-target.md", targets),
    "decisions": (DOCS / "explanation" / "decisions.md", decisions),
}


def filled(name: str) -> str:
    """The page with its generated part as it should be now."""
    page, part = PARTS[name]
    text = page.read_text(encoding="utf-8")
    return re.sub(MARKS.format(name), lambda marks: f"{marks[1]}\n{part()}\n{marks[2]}", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    for name, (page, _) in PARTS.items():
        page.write_text(filled(name), encoding="utf-8")
