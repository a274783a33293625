"""The memory that this process may still take: of the machine, and within the limits of its control groups.

A container's limit is in the files of its control group, of version 1 or 2; /proc/meminfo knows nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# What a fit of a whole model takes: the model, its copy, gradients, and about two for second moments and rounding.
_TIMES: Final = 5
_FLOAT: Final = 4

# Of a control group: where it is mounted, the limit, what is used, and how much of that is cache to be dropped at need.
_SECOND: Final = (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")
_FIRST: Final = (
    ("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)  # fmt: skip
_Kind = tuple[tuple[str, ...], str, str, str]


def fits_whole(numbers: int) -> bool:
    """Whether there is memory for a fit of a whole model, as far as the system says.

    Args:
        numbers: how many its weights are.
    """
    free = available()
    return free is None or _TIMES * _FLOAT * numbers <= free


def available(root: Path = Path("/")) -> int | None:
    """The bytes that this process may still take; None if the system does not say.

    Args:
        root: where the system's files are.
    """
    left = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(left)) if left else None


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])
            return
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" in names:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    """What is left of each limit that holds for this process."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            kind = _FIRST if controllers else _SECOND
            for mount in kind[0]:
                yield from _within(root / mount, path.strip("/"), kind)


def _within(mount: Path, path: str, kind: _Kind) -> Iterator[int]:
    """What is left in a group and in those around it. Inside a container its own may be the mounted one."""
    _, limit, used, cache = kind
    group = mount / path
    for place in (group, *(one for one in group.parents if one.is_relative_to(mount))):
        most, now = _number(place / limit), _number(place / used)
        if most is None or now is None:
            continue
        spare = (line.split()[1] for line in _lines(place / "memory.stat") if line.split()[:1] == [cache])
        yield most - now + int(next(spare, 0))


def _number(file: Path) -> int | None:
    """The number in a file; None if it is not there, or says "max"."""
    text = next(iter(_lines(file)), "")
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # another system, or not for us to see
        return []
