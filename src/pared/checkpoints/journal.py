"""The journal of a compression: the tensors packed so far, in a hidden folder that survives a killed process.

The folder holds `journal.jsonl` and `data`. The first line of the journal says what the work depends on and how finely
each tensor is rounded; each further line is the index entry of one packed tensor, whose bytes are in `data`. A tensor
counts as packed once its line is complete; its bytes are checked against their checksum when a run resumes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from pared.artifact.index import Entry
from pared.artifact.parse import parse_entry
from pared.checkpoints.packing import PackedTensor, entry_of
from pared.checkpoints.selection import Kept
from pared.errors import CorruptError, UnsafeError
from pared.files.checks import Place
from pared.files.directories.lock import owned
from pared.files.directories.writable import writing_to
from pared.files.disk import open_file, write_atomic

log = logging.getLogger(__name__)

FOLDER: Final = ".pared-compress"
_JOURNAL: Final = "journal.jsonl"
_DATA: Final = "data"
_LOCK: Final = "lock"
_CHUNK: Final = 1 << 22


class Journal:
    """The tensors packed so far, and where to add the next ones. A context manager.

    Args:
        directory: the output directory, in which the hidden folder is created.
        depends: everything the packed bytes depend on, as JSON values; a journal with other values is discarded.

    Raises:
        FileError: the folder cannot be read or written, or another process is using it.
    """

    def __init__(self, directory: Path, depends: Mapping[str, Any]) -> None:
        self.folder = directory / FOLDER
        self.entries: list[Entry] = []
        self._depends = dict(depends)
        self._journal: BinaryIO | None = None
        self._data: BinaryIO | None = None
        self.plan: dict[str, Any] | None = None
        with writing_to(directory):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._held.enter_context(owned(directory, file=f"{FOLDER}/{_LOCK}"))
        try:
            with writing_to(directory):
                self._take_over()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._held.close()
        with contextlib.suppress(OSError):  # it holds packed tensors, or another run has just begun
            self.folder.rmdir()

    def _close(self) -> None:
        for file in (self._journal, self._data):
            if file is not None:
                file.close()

    @property
    def end(self) -> int:
        """The number of bytes in the data file."""
        return self.entries[-1].end if self.entries else 0

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Discard all packed tensors and start again with another plan."""
        self._close()
        self.entries, self.plan = [], dict(plan)
        head = json.dumps({"depends": self._depends, "plan": self.plan}).encode() + b"\n"
        with writing_to(self.folder.parent):
            (self.folder / _DATA).write_bytes(b"")
            write_atomic(self.folder / _JOURNAL, lambda file: file.write(head))
            self._open()

    def keep(self, kept: Sequence[Kept]) -> None:
        """Begin again unless the packed tensors are the first of these: anyone may have written a journal."""
        packed = [(entry.names, entry.dtype, entry.shape) for entry in self.entries]
        if packed != [(one.names, one.held.dtype, one.held.shape) for one in kept[: len(packed)]]:
            log.warning("%s: the journal is about other tensors; it is begun again", self.folder)
            self._close()
            self.entries, self.plan = [], None

    def add(self, kept: Kept, packed: PackedTensor) -> None:
        """Record a packed tensor."""
        assert self._data is not None
        assert self._journal is not None
        entry = entry_of(kept, packed, self.end)
        with writing_to(self.folder.parent):
            end = self.end
            for part, piece in zip(entry.parts.values(), packed.parts.values(), strict=True):
                _write(self._data, bytes(part.offset - end))
                _write(self._data, piece.payload)
                end = part.end
            _write(self._journal, json.dumps(entry.to_json()).encode() + b"\n")
        self.entries.append(entry)

    def data(self) -> Iterator[bytes]:
        """The data record of the artifact, in chunks."""
        with (self.folder / _DATA).open("rb") as file:
            left = self.end
            while left and (piece := file.read(min(_CHUNK, left))):
                left -= len(piece)
                yield piece

    @contextmanager
    def opened(self) -> Iterator[memoryview]:
        """The data record of the artifact, memory-mapped."""
        if not self.end:
            yield memoryview(b"")
            return
        with open_file(self.folder / _DATA) as file:
            yield file.data[: self.end]

    def remove(self) -> None:
        """Delete the journal and its data; the folder is removed when the journal is closed."""
        self._close()
        with writing_to(self.folder.parent):
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()

    def _open(self) -> None:
        # Unbuffered: what is written survives the death of the process.
        self._journal = (self.folder / _JOURNAL).open("ab", buffering=0)
        self._data = (self.folder / _DATA).open("ab", buffering=0)

    def _take_over(self) -> None:
        """Resume what an earlier run left, if it depends on the same values."""
        lines = self._lines()
        head = _parsed(lines[0]) if lines else {}
        if head.get("depends") == self._depends:
            plan = head.get("plan")
            self.plan = plan if isinstance(plan, dict) else None
            self._resume(lines)

    def _lines(self) -> list[bytes]:
        path = self.folder / _JOURNAL
        if not path.is_file() or not (self.folder / _DATA).is_file():
            return []
        whole = path.read_bytes()
        return whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)

    def _resume(self, lines: list[bytes]) -> None:
        """Keep the tensors whose lines and bytes are sound, and truncate the rest."""
        size = len(lines[0])
        with (self.folder / _DATA).open("rb") as file:
            for line in lines[1:]:
                entry = self._entry(line)
                if entry is None or not _is_sound(entry, file):
                    break
                self.entries.append(entry)
                size += len(line)
        with (self.folder / _JOURNAL).open("r+b") as journal, (self.folder / _DATA).open("r+b") as data:
            journal.truncate(size)
            data.truncate(self.end)
        self._open()

    def _entry(self, line: bytes) -> Entry | None:
        try:
            return parse_entry(_parsed(line), self.end, Place(str(self.folder / _JOURNAL)))
        except (CorruptError, UnsafeError):
            return None  # a truncated line: its tensor is packed again


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # a truncated line
    return found if isinstance(found, dict) else {}


def _is_sound(entry: Entry, file: BinaryIO) -> bool:
    crc32 = 0
    for part in entry.parts.values():
        file.seek(part.offset)
        left = part.length
        while left and (piece := file.read(min(_CHUNK, left))):
            crc32, left = zlib.crc32(piece, crc32), left - len(piece)
        if left:
            return False
    return crc32 == list(entry.parts.values())[-1].crc32


def _write(file: BinaryIO, piece: bytes | memoryview) -> None:
    """Write all bytes: an unbuffered file may accept only some of them at a time."""
    view = memoryview(piece)
    while view.nbytes:
        view = view[file.write(view) :]
