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


def test_a_long_name_is_divided_between_its_parts() -> None:
    name = "model.language_model.layers.10.self_attn.q_proj.parametrizations.weight.original0"
    columns = ["tensor", "shape", "format", "bits", "bytes", "damage", "runs", "why"]
    row = [name, "11008x4096", "grid int8", "4.25", "1,234,567,890", "1.2e-05", "int8 dynamic", "[1]"]
    lines = terminal.table(columns, [row])[3:-1]
    parts = [line.split()[0] for line in lines]
    assert len(lines) > 3
    assert "".join(parts) == name
    assert all(part.endswith(".") for part in parts[:-1])
    assert lines[0].split()[1:] == " ".join(row[1:]).split()
    assert max(map(len, lines)) <= terminal.WIDTH


def test_a_part_that_is_wider_than_its_column_is_folded() -> None:
    lines = terminal.table(["tensor", "bytes"], [["a." + 300 * "x" + ".b", "1"]])[3:-1]
    assert [line.split()[0] for line in lines[:1]] == ["a."]
    assert "".join(line[:95].strip() for line in lines) == "a." + 300 * "x" + ".b"
