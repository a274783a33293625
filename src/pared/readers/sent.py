"""A listing that goes to another process, which opens the files itself."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from pared.errors import FileError
from pared.files.disk import reading
from pared.readers import open_listing
from pared.readers.listing import Listing, Storage


@dataclass(frozen=True, eq=False)
class SentListing:
    """A listing that can be pickled: what is sent is where its files are.

    Args:
        listing: of `open_listing`, possibly with more storages, whose bytes are sent.
        path: what was opened.
        part: see `open_listing`.
        opened: what holds the files open; None: its owner does.
    """

    listing: Listing
    path: Path
    part: bool = False
    opened: ExitStack | None = None

    @property
    def files(self) -> list[Path]:
        """The files that another process has to find at the same places."""
        return list(self.listing.files.values()) or [self.path]

    def __reduce__(self) -> tuple[object, ...]:
        with reading(self.path):
            stats = tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in self.files))
        with open_listing(self.path, part=self.part) as plain:
            more = tuple(
                (name, bytes(storage.content()))
                for name, storage in self.listing.storages.items()
                if name not in plain.storages and storage.content is not None
            )
        return _received, (self.path.absolute(), self.part, stats, more)


@lru_cache(maxsize=1)  # a worker does many tasks about one checkpoint, whose headers are read once
def _received(
    path: Path, part: bool, stats: tuple[tuple[int, int], ...], more: tuple[tuple[str, bytes], ...]
) -> SentListing:
    """Open the files of a listing, which stay open until another one is received."""
    opened = ExitStack()
    listing = opened.enter_context(open_listing(path, part=part))
    found = SentListing(listing, path, part, opened)
    if [size for size, _ in stats] != [file.stat().st_size for file in found.files]:
        raise FileError("has changed since the work began", where=str(path), remedy="Begin again.")
    added = {name: Storage(len(content), partial(_view, content), coded=True) for name, content in more}
    return replace(found, listing=replace(listing, storages={**listing.storages, **added}))


def _view(content: bytes) -> memoryview:
    return memoryview(content)
