"""Runs the pages of the documentation: their Python, their commands, and the output that they show.

On a page, in order and in one directory of its own:

* a ` ```python ` block runs, and the names it makes stay for the next one; with `title="name.py"` it is written to that
  file instead;
* a ` ```text ` block straight after it is what it prints;
* a ` ```console ` block holds `$ pared ...` lines, each followed by what the command prints;
* other blocks (` ```sh `, ` ```yaml `) are only read.

`python -m tests.documents PAGE...` writes what is really printed into the pages.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from pared import cli

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
_CLOSE = 0.1  # byte counts, which are numbers with thousands separators, are compared within this share


@dataclass(frozen=True)
class Shown:
    """What a page shows for one piece of code, and where in its text; what that code printed."""

    code: str
    expected: str
    span: tuple[int, int]
    printed: str


def run(text: str) -> Iterator[Shown]:
    """Run a page in the current directory."""
    names: dict[str, object] = {"__name__": "__page__"}
    found = list(_BLOCK.finditer(text))
    for block, following in zip(found, [*found[1:], None], strict=True):
        language, title, code = block.groups()
        if title:
            Path(title).write_text(code, encoding="utf-8")
        elif language == "python":
            with _captured() as output:
                exec(compile(code, "<page>", "exec"), names)
            if following is not None and following[1] == "text" and not text[block.end() : following.start()].strip():
                yield Shown(code, following[3], following.span(3), output.getvalue())
        elif language == "console":
            for command in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", code, re.MULTILINE):
                start = block.start(3)
                span = (start + command.start(2), start + command.end(2))
                yield Shown(command[1], command[2], span, _command(command[1]))


def _command(line: str) -> str:
    """What a command line of ours prints, errors included."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "pared", f"only `pared` can be run, not {line!r}"
    command = mock.patch.object(sys, "argv", [program, *arguments])
    with _captured() as output, command, contextlib.suppress(SystemExit):
        cli.main()
    return output.getvalue()


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


def agrees(expected: str, printed: str) -> bool:
    """Whether the output shown is the output, up to numbers and spaces.

    `...` stands for anything. Byte counts (with a thousands separator) must be close; other numbers may vary.

    >>> agrees("model.pt: 1,000 bytes, 0.12 s", "model.pt:  1,020 bytes, 4 s")
    True
    >>> agrees("1,000 bytes", "2,000 bytes"), agrees("a ... d", "a b c d"), agrees("a b", "a c")
    (False, True, False)
    """
    parts, position, plain = [], 0, _plain(expected)
    for number in _NUMBER.finditer(plain):
        parts += [plain[position : number.start()], number[0]]
        position = number.end()
    literals, numbers = [*parts[::2], plain[position:]], parts[1::2]
    pattern = f"({_NUMBER.pattern})".join(re.escape(part).replace(r"\.\.\.", ".*?") for part in literals)
    found = re.fullmatch(pattern, _plain(printed), re.DOTALL)
    if found is None:
        return False
    counts = [(_count(a), _count(b)) for a, b in zip(numbers, found.groups(), strict=True) if "," in a]
    return all(abs(a - b) <= _CLOSE * a for a, b in counts)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"─+", "─", text)).strip()


def _count(number: str) -> float:
    return float(number.replace(",", ""))


def _rewrite(page: Path) -> None:
    """Put what is printed now into a page; parts that were left out by `...` come back."""
    text = page.read_text(encoding="utf-8")
    for shown in reversed(list(run(text))):
        if not shown.expected or not agrees(shown.expected, shown.printed):
            start, end = shown.span
            lines = "".join(f"{line.rstrip()}\n" for line in shown.printed.rstrip().splitlines())
            text = text[:start] + lines + text[end:]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        target = Path(name).resolve()
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            _rewrite(target)
