"""The error family: every error says what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
from typing import Final

DAMAGED: Final = "Fetch the file again; it is damaged."
DANGEROUS: Final = "Do not use this file: pared writes nothing like it, and reading it could exhaust the memory."

_LONGEST: Final = 300  # characters of a reason
_INSTALLED: Final = re.compile(r"[/\\](?:site|dist)-packages[/\\](\w+)")


def printable(text: str) -> str:
    r"""Escape what would move a terminal's cursor or change its colours, in text from a file.

    >>> print(printable("a\x1b[2J"))
    a\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: BaseException) -> str:
    """An error of any kind in one line: the first of its message, and its class where that is not one of ours.

    What an installed library raised names the library, as in "RuntimeError: shapes do not match (raised in torch)".

    >>> reason_of(KeyError("weight")), reason_of(ValueError(""))
    ('KeyError: weight', 'ValueError')
    """
    if isinstance(error, ParedError):
        return _line(error.what)
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # whose text is the key's `repr`
    line, library = _line(str(text)), _library(error)
    named = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return printable(f"{named} (raised in {library})" if library else named)


def _line(text: str) -> str:
    """The first line of a text, of which others explain more to who can see the traceback."""
    lines = text.strip().splitlines()
    return lines[0][:_LONGEST] if lines else ""


def _library(error: BaseException) -> str:
    """The installed package in which an error was raised; "" if it was raised elsewhere, or in pared."""
    file, place = "", error.__traceback__
    while place is not None:
        file, place = place.tb_frame.f_code.co_filename, place.tb_next
    found = _INSTALLED.search(file)
    return found[1] if found and found[1] != "pared" else ""


class ParedError(ValueError):
    """Base of all errors that `pared` raises on purpose.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: the tensor, module, option or file concerned; printed first. Empty: nowhere in particular.
        remedy: what the reader can do; printed on a line of its own.

    >>> print(ParedError("holds NaN at row 3", where="encoder.weight", remedy="Repair the checkpoint."))
    encoder.weight: holds NaN at row 3
      Repair the checkpoint.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        head = f"{where}: {what}" if where else what
        # Names come from files, and errors are shown in terminals.
        super().__init__(f"{printable(head)}\n  {printable(remedy)}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle through the keyword arguments (the default would pass the finished text)."""
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(cls: type[ParedError], what: str, where: str, remedy: str) -> ParedError:
    return cls(what, where=where, remedy=remedy)


class ConfigError(ParedError):
    """An option, a rule or a plan does not make sense."""


class ModelError(ParedError):
    """The model cannot be compressed as it is."""


class CalibrationError(ParedError):
    """The calibration data are missing, empty, ambiguous or do not fit the model."""


class EvaluationError(ParedError):
    """`eval_func` or `confirm_func` failed or returned no score, or a model cannot be scored on a text."""


class WorkerError(ParedError):
    """Workers on other machines cannot be reached, differ from this process, or cannot do the work."""


class FileError(ParedError):
    """A file cannot be read or written."""


class CorruptError(FileError):
    """The bytes of a file contradict themselves: truncated, flipped, missing or extra."""

    def __init__(self, what: str, *, where: str = "", remedy: str = DAMAGED) -> None:
        super().__init__(what, where=where, remedy=remedy)


class VersionError(FileError):
    """The file was written by a newer version."""


class UnsafeError(FileError):
    """Reading the file would execute code or inflate without bound; it was refused."""


class MismatchError(FileError):
    """The file is sound but does not belong to this model."""
