"""One process that reads damaged files of one kind: `python -m tests.fuzz.child FOLDER KIND FIRST COUNT SECONDS`.

FOLDER holds the sound files, and takes the number of the file that is being read, so that whoever started the process
knows which one it was if the process dies. Ends with an assertion error at the first file that breaks a promise.
"""

import importlib
import os
import resource
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from types import FrameType

import numpy as np

from pared import readers
from pared.artifact.envelope import open_records
from pared.artifact.parse import parse_index
from pared.errors import ParedError
from pared.files.disk import open_file
from pared.readers.kinds import list_tensors
from pared.readers.listing import ListedTensor, Listing
from tests.fuzz.damage import damaged

PER_BYTE = 4
PROMISED = 64 << 20  # beside that, as docs/security.md has it
CONSTANT = 1 << 20  # beside it in truth: exceptions with their tracebacks, Python's own caches
MEASURED = 8  # one in so many files is measured to the byte, which takes thrice the time
# Arrays up to so many bytes are read whole; of others, which may be views of few bytes, two elements.
READ_ALL = 1 << 16

# Whatever would run code, or look elsewhere.
FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "code.")

# The damaged file of a folder, by kind.
FOLDERS = {"folder": "model/model.safetensors.index.json", "distributed checkpoint": "dcp/.metadata"}


class Hang(BaseException):
    """A file takes too long."""


def main() -> None:
    """Read the files."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    first, count, seconds = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    bases = [path.read_bytes() for path in sorted(folder.glob("base*"))]
    for base in bases:  # what is imported at first use is imported now
        look(base, kind, folder)
    for name in ("encodings.cp437", "encodings.latin_1", "encodings.unicode_escape", "encodings.raw_unicode_escape"):
        importlib.import_module(name)
    signal.signal(signal.SIGALRM, stop)
    # What is promised, for every file: beyond it, Python raises MemoryError, which is no error of ours.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + PER_BYTE * max(map(len, bases)) + PROMISED, resource.RLIM_INFINITY))
    watched = watch(folder)
    with (folder / "current").open("wb") as current:
        for i in range(first, first + count):
            random = Random(f"{kind}/{i}")
            file = damaged(random.choice(bases), random)
            os.pwrite(current.fileno(), b"%12d" % i, 0)
            with within(seconds), measured(PER_BYTE * len(file) + CONSTANT, i % MEASURED == 0):
                look(file, kind, folder)
            assert watched == [], watched
    assert kind.startswith("artifact") or "torch" not in sys.modules


def look(file: bytes, kind: str, folder: Path) -> None:
    """An error of ours, or a sound listing."""
    try:
        if kind.startswith("artifact"):
            with open_records(file, "file") as records:
                parse_index(records)
        elif kind == "ONNX with data outside":
            (folder / "model.onnx").write_bytes(file)
            with readers.open_listing(folder / "model.onnx") as listing:
                check(listing)
        elif kind in FOLDERS:
            path = folder / FOLDERS[kind]
            path.write_bytes(file)
            with readers.open_listing(path.parent) as listing:
                check(listing)
        else:
            with open_file(file, "file") as opened:
                check(list_tensors(opened))
    except ParedError as error:
        words = str(error)
    else:
        return
    assert "\n  " in words


def check(listing: Listing) -> None:
    """Storages and notes are within the file, tensors within storages, and numbers can be read or are refused."""
    taken = sum(storage.nbytes for storage in listing.storages.values())
    assert 0 <= taken + sum(note.nbytes for note in listing.notes.values()) <= listing.nbytes
    assert all(storage.nbytes >= 0 for storage in listing.storages.values())
    assert all(note.nbytes >= 0 for note in listing.notes.values())
    for held in listing.tensors:
        assert held.storage is None or held.storage in listing.storages
        assert held.nbytes >= 0
        with suppress(ParedError):
            numbers(listing, held)


def numbers(listing: Listing, held: ListedTensor) -> None:
    """Read a tensor's first and last number, or all of them."""
    array = listing.array(held)
    if array is None:
        return
    assert array.shape == held.shape
    if array.nbytes <= READ_ALL:
        assert len(array.tobytes()) == array.nbytes
    elif array.size:
        assert np.isscalar(array[(0,) * array.ndim])
        assert np.isscalar(array[(-1,) * array.ndim])


def watch(folder: Path) -> list[str]:
    """What happens from now on that must not."""
    found: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.walk", "os.scandir"):
            if not str(arguments[0]).startswith(str(folder)):
                found.append(f"{event} {arguments[0]!r}")
        elif event.startswith(FORBIDDEN):
            found.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return found


def stop(_: int, __: FrameType | None) -> None:
    """End a file that takes too long."""
    raise Hang


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """See that what is done takes no more time."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def measured(nbytes: int, wanted: bool) -> Iterator[None]:
    """See that what is done takes no more memory."""
    if not wanted:
        yield
        return
    tracemalloc.start()
    yield
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken <= nbytes, f"{taken:,} bytes of memory"


if __name__ == "__main__":
    main()
