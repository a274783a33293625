"""The memory that is left, by files as Linux has them."""

from pathlib import Path

import pytest

from pared.fitting.hugging_face.memory import available

MACHINE = {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 4000 kB\n"}
SECOND = {"memory.max": "3000000\n", "memory.current": "1000000\n", "memory.stat": "anon 5\ninactive_file 200000\n"}
FIRST = {
    "memory.limit_in_bytes": "3000000\n",
    "memory.usage_in_bytes": "1000000\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200000\n",
}
WIDE = {"memory.max": "max\n", "memory.current": "2000000\n"}


def under(place: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{place}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4_096_000),
        ({"proc/self/cgroup": "0::/\n"}, 4_096_000),
        ({"proc/self/cgroup": "0::/a/b\n", **under("sys/fs/cgroup/a/b", SECOND)}, 2_200_000),
        ({"proc/self/cgroup": "0::/a/b\n", **under("sys/fs/cgroup/a", SECOND)}, 2_200_000),
        ({"proc/self/cgroup": "0::/of/the/host\n", **under("sys/fs/cgroup", SECOND)}, 2_200_000),
        ({"proc/self/cgroup": "0::/a\n", **under("sys/fs/cgroup/a", WIDE)}, 4_096_000),
        ({"proc/self/cgroup": "0::/a\n", **under("sys/fs/cgroup/other", SECOND)}, 4_096_000),
        ({"proc/self/cgroup": "4:cpu:/\n3:memory:/a\n", **under("sys/fs/cgroup/memory/a", FIRST)}, 2_200_000),
        ({"proc/self/cgroup": "3:memory:/a:b\n", **under("sys/fs/cgroup/memory/a:b", FIRST)}, 2_200_000),
        ({"proc/self/cgroup": "3:cpu,memory:/host\n", **under("sys/fs/cgroup/memory", FIRST)}, 2_200_000),
        (
            {"proc/self/cgroup": "0::/a\n", **under("sys/fs/cgroup/a", {**SECOND, "memory.current": "4000000\n"})},
            0,
        ),
    ],
)
def test_the_least_that_is_left(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in {**MACHINE, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available(tmp_path) == expected


def test_this_machine_says_what_is_left() -> None:
    assert (available() or 1) > 0
