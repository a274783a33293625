"""Starts the processes that read damaged files, and says which file broke what."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.fuzz.bases import BASES, BESIDE
from tests.fuzz.damage import damaged

ROOT = Path(__file__).parents[2]


@contextmanager
def started(folder: Path, count: int, seconds: float) -> Iterator[dict[str, Future[str]]]:
    """Fuzz all readers, as many at a time as there are cores.

    Args:
        folder: an empty directory.
        count: of damaged files for each reader.
        seconds: that one file may take.

    Returns:
        by kind, what went wrong; "" if nothing did.
    """
    # Before there are threads: filters of warnings belong to the whole process.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls old kinds of its files deprecated; they stay all the same
        bases = {kind: make() for kind, make in BASES.items()}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield {
            kind: pool.submit(fuzz, folder / kind.replace(" ", "-"), kind, bases[kind], count, seconds)
            for kind in BASES
        }


def fuzz(folder: Path, kind: str, bases: Sequence[bytes], count: int, seconds: float, first: int = 0) -> str:
    """What went wrong with one kind, whose sound files are damaged; "" if nothing did."""
    folder.mkdir()
    for i, base in enumerate(bases):
        (folder / f"base{i}").write_bytes(base)
    for name, content in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.child"]
    arguments = [str(folder), kind, str(first), str(count), str(seconds)]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    if done.returncode == 0:
        return ""
    current = folder / "current"
    if not current.exists():
        return done.stderr
    number = int(current.read_text() or 0)
    random = Random(f"{kind}/{number}")
    (folder / "broken").write_bytes(damaged(random.choice(bases), random))
    return f"{kind}, file {number}, kept as {folder / 'broken'}\n{done.stderr[-4000:]}"
