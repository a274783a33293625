"""Tables of very many rows, which are laid out without the library that lays out the others."""

import random

import pytest

from pared import terminal

HEADINGS = (
    ["tensor", "shape", "format", "bits", "bytes", "damage", "runs", "why"],
    ["tensor", "only in", "bytes"],
    ["output of", "class", "cosine"],
    ["trial", "score"],
    ["tensor", "output of"],
)
ALPHABETS = ("abcdefghij.", "ab c-d_", "é漢字a.", "\x1b[31m", "0123456789", "[bold]x[/]:smile:")


@pytest.mark.parametrize("headings", HEADINGS)
@pytest.mark.parametrize("seed", range(8))
def test_many_rows_look_like_few(headings: list[str], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(f"{headings} {seed}")

    def cell(heading: str) -> str:
        longest = draw.choice([3, 8, 14, 30, 130]) if heading not in ("bits", "bytes", "score") else 9
        alphabet = draw.choice(ALPHABETS)
        return "".join(draw.choice(alphabet) for _ in range(draw.randint(0, longest)))

    rows = [[cell(heading) for heading in headings] for _ in range(30)]
    monkeypatch.setattr(terminal, "_MANY_ROWS", 100)
    few = terminal.table(headings, rows)
    monkeypatch.setattr(terminal, "_MANY_ROWS", 5)
    assert terminal.table(headings, rows) == few
