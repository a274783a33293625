"""What runs on every node before any work does. It is sent as it stands, so it uses Python's library alone."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import zlib
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "torch", "ray")
_ENDS = 1 << 16  # bytes at the beginning and at the end of a file


def versions() -> dict[str, str]:
    """The versions of what decides about bytes, by name; "" where it is not installed."""
    found = {"Python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    try:
        import pared

        found["pared"] = pared.__version__
    except ImportError:
        found["pared"] = ""
    return found | {name: _installed(name) for name in _PACKAGES}


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def look(path: str) -> tuple[int, int] | None:
    """The size of a file, and a checksum of its beginning and end; None if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            crc32 = zlib.crc32(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            return size, zlib.crc32(file.read(_ENDS), crc32)
    except OSError:
        return None


def leave(directory: str, name: str) -> str:
    """Write a file; returns "", or why that fails."""
    try:
        (Path(directory) / name).write_bytes(b"")
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def report(paths: tuple[str, ...]) -> dict[str, Any]:
    """What a node says about itself."""
    return {
        "versions": versions(),
        "files": {path: look(path) for path in paths},
        "executable": sys.executable,
    }
