"""The workspace of a streamed fit: what each phase found, in files that are written whole.

A file that is there is complete, so a run that was killed goes on after the last of them.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from pared.errors import FileError
from pared.files.disk import write_atomic
from pared.fitting.records.fingerprint import damaged, read_object

FIXED: Final = -1  # the "option" of a tensor whose format a rule decided
_CODED: Final = "coded"
_STREAMS: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Streams:
    """Hidden states of every call, one after the other in a file.

    Args:
        shapes: the shape of each call's.
        dtype: "bfloat16" or "float32".
        times: how many of them there are for each call.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    times: int = 1

    @property
    def nbytes(self) -> int:
        """The size of a file."""
        return self.times * sum(math.prod(shape) for shape in self.shapes) * _STREAMS[self.dtype].itemsize

    def read(self, path: Path) -> Iterator[Tensor]:
        """The hidden states in float32, in order.

        Raises:
            FileError: the file is of another size.
        """
        if path.stat().st_size != self.nbytes:
            raise damaged(path, f"it has {path.stat().st_size:,} bytes, not {self.nbytes:,}")
        with path.open("rb") as file:
            for shape in self.shapes * self.times:
                data = bytearray(math.prod(shape) * _STREAMS[self.dtype].itemsize)
                file.readinto(data)
                yield torch.frombuffer(data, dtype=_STREAMS[self.dtype]).reshape(shape).float()

    def write(self, path: Path, states: Iterable[Tensor]) -> None:
        """Write hidden states, which are computed as they are written."""

        def write(file: BinaryIO) -> None:
            for state in states:
                file.write(self._bytes(state))

        write_atomic(path, write)

    def _bytes(self, state: Tensor) -> bytes:
        return (
            state.detach().to(_STREAMS[self.dtype]).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )


@dataclass(frozen=True)
class Store:
    """Where everything of a streamed fit is.

    Args:
        directory: the workspace, which exists.
        numbers: those of the model's tensors, by their first names.
    """

    directory: Path
    numbers: Mapping[str, int] = field(default_factory=dict)

    def entering(self, number: int, shard: int) -> Path:
        """What enters a block in the calls of a shard."""
        return self.directory / f"entering-{number:04d}-{shard:02d}.bin"

    def gradient(self, number: int, shard: int) -> Path:
        """The gradients of what enters a block; one more: of what leaves the last."""
        return self.directory / f"gradient-{number:04d}-{shard:02d}.bin"

    def traced(self, part: str) -> Path:
        """What the tensors of a part could become."""
        return self.directory / f"traced-{part}"

    def coded(self, name: str, option: int) -> Path:
        """A tensor in one of its formats, by its first name."""
        return self.directory / _CODED / f"{self.numbers[name]:06d}-{option}.bin"

    def target(self, name: str) -> Path:
        """What rounding a tensor needs, by its first name."""
        return self.directory / "targets" / f"{self.numbers[name]:06d}.bin"

    @property
    def candidate(self) -> Path:
        """Where artifacts are put together to be scored."""
        return self.directory / "candidate"

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was noted under a name; None if nothing was."""
        return read_object(self.directory / f"{name}.json")

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        """Record JSON values under a name."""
        write_atomic(self.directory / f"{name}.json", lambda file: file.write(json.dumps(dict(values)).encode()))

    def keep_coded(self, wanted: Collection[Path]) -> None:
        """Delete all coded tensors but these."""
        self.forget([path for path in (self.directory / _CODED).glob("*.bin") if path not in wanted])

    def forget(self, paths: Sequence[Path]) -> None:
        """Delete what is of no more use."""
        for path in paths:
            path.unlink(missing_ok=True)

    @contextmanager
    def phase(self, doing: str, needed: int, directory: Path | None = None) -> Iterator[None]:
        """Name what was going on, and how much space it needs, where the disk is full.

        Args:
            doing: in words.
            needed: about how many bytes it writes, or all phases do.
            directory: where it writes; default: to the workspace.

        Raises:
            FileError: the disk is full. What was done stays.
        """
        try:
            yield
        except (OSError, FileError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                place = directory or self.directory
                free = shutil.disk_usage(place if place.is_dir() else place.parent).free
                raise FileError(
                    f"the disk is full while {doing}: about {needed:,} bytes are needed, and {free:,} are free",
                    where=str(place),
                    remedy="Free space and call it again: what was done stays, and is not done again.",
                ) from error
            raise
