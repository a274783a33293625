"""Whether a workspace belongs to this very run: the same model, data and options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pared.errors import ConfigError, FileError
from pared.files.disk import write_atomic

START_AGAIN: Final = "Delete the workspace to start again, or pass another directory."
_FILE: Final = "fingerprint.json"
_VALUE_LENGTH: Final = 60  # characters of a value that an error shows


def recorded(directory: Path, field: str) -> str | None:
    """What is recorded in a directory under a name; None if nothing is.

    Raises:
        FileError: the record is damaged.
    """
    found = (read_object(directory / _FILE) or {}).get(field)
    return found if isinstance(found, str) else None


def claim(directory: Path, fingerprint: Mapping[str, str]) -> None:
    """Record what a run depends on, or compare it with what is recorded.

    Args:
        directory: the workspace, which exists.
        fingerprint: what the run depends on, as text.

    Raises:
        ConfigError: the directory belongs to a run with another fingerprint.
        FileError: it cannot be read or written, or its record is damaged.
    """
    path = directory / _FILE
    before = read_object(path)
    if before is None:
        write_atomic(path, lambda file: file.write(json.dumps(dict(fingerprint), indent=1).encode()))
        return
    for field in dict.fromkeys([*fingerprint, *before]):
        then, now = before.get(field), fingerprint.get(field)
        if then is not None and not isinstance(then, str):
            raise damaged(path, f"its {field[:_VALUE_LENGTH]!r} is not text")
        if then != now:
            raise ConfigError(
                f"belongs to another search: {field} was {_short(then)} and is {_short(now)}",
                where=str(directory),
                remedy=START_AGAIN,
            )


def is_claimed(directory: Path) -> bool:
    """Whether a directory is the workspace of a run."""
    return (directory / _FILE).is_file()


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object in a file; None if there is no file.

    Raises:
        FileError: it is something else.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(data, dict):
        raise damaged(path, "it is not a JSON object")
    return data


def damaged(path: Path, why: object) -> FileError:
    """The error for a record that cannot be read."""
    return FileError(f"cannot be read ({why})", where=str(path), remedy=START_AGAIN)


def _short(value: object) -> str:
    """A value of the fingerprint, short enough for one line of an error."""
    if value is None:
        return "not recorded"
    text = str(value)
    return repr(text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 3] + "...")
