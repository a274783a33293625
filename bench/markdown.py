"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(line)} |" for line in (columns, *rows))
    return "\n".join([first, "|" + "---|" * len(columns), *rest])
