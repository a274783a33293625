"""Codes of a grid that stay the bytes of a file: what a model holds that is to take as little memory as its file."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pared.files.threads import usable_cores
from pared.formats.encoded.rows import decode_rows
from pared.formats.streams import EncodedPart, decode_codes, encode_codes
from pared.formats.views import View


@final
class EncodedCodes:
    """The codes of a tensor as a file has them, decoded whenever they are asked for, in threads.

    Tied weights share one of these, as they would share a tensor: what `take` changes, it changes for all of them.

    Args:
        streams: the bytes of the codes, by part, as `encode_codes` gives them; they are copied. They have been decoded
            once, so that they are known to be right.
        shape: the tensor's.
        lines: the view whose rows are divided into classes.
        kind: int8 or int16.

    >>> codes = torch.eye(4, dtype=torch.int8)
    >>> encoded = EncodedCodes(encode_codes(codes.numpy(), View((4, 4), (0,))), (4, 4), View((4, 4), (0,)), torch.int8)
    >>> torch.equal(encoded.decode(), codes), encoded.rows(torch.tensor([[3]])).tolist()
    (True, [[[0, 0, 0, 1]]])
    """

    def __init__(
        self, streams: Mapping[str, EncodedPart], shape: tuple[int, ...], lines: View, kind: torch.dtype
    ) -> None:
        self.streams = {
            name: replace(part, payload=bytes(part.payload))
            for name, part in streams.items()
            if name.startswith(("codes", "classes"))
        }
        self.shape, self.kind, self._lines = shape, kind, lines
        self._last: weakref.ref[Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that are held."""
        return sum(len(part.payload) for part in self.streams.values())

    def decode(self) -> Tensor:
        """The codes, of `shape` and `kind`, on the CPU: one tensor as long as someone holds it, so that ties stay."""
        last = self._last() if self._last is not None else None
        if last is None:
            last = torch.from_numpy(decode_codes(self.streams, self.shape, self._lines, self._name, usable_cores()))
            self._last = weakref.ref(last)
        return last

    def rows(self, indices: Tensor) -> Tensor:
        """What `F.embedding(indices, self.decode())` gives; only the chunks are decoded in which these rows stand.

        Raises:
            IndexError: there is no such row.
        """
        wanted, places = np.unique(indices.detach().cpu().numpy(), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.shape[0]:
            raise IndexError("index out of range in self")
        found = decode_rows(self.streams, self.shape, self._lines, self._name, wanted.astype(np.int64), usable_cores())
        return F.embedding(torch.from_numpy(places).reshape(indices.shape), torch.from_numpy(found)).to(indices.device)

    def take(self, codes: Tensor) -> None:
        """Hold other codes, of the same shape and type."""
        self.streams = encode_codes(codes.detach().cpu().contiguous().numpy(), self._lines, usable_cores())
        self._last = None

    @property
    def _name(self) -> str:
        return str(self.kind).removeprefix("torch.")

    def __deepcopy__(self, _memo: dict[int, Any]) -> EncodedCodes:
        """A copy, which shares the bytes: nobody writes them."""
        return EncodedCodes(self.streams, self.shape, self._lines, self.kind)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the last codes, since weak references cannot be pickled."""
        return {**self.__dict__, "_last": None}


@final
class Undecoded(Mapping[str, Tensor]):
    """The parts of a grid, as in `Coded.parts`, whose codes are decoded at each access.

    Args:
        codes: the codes.
        steps: the other parts.
    """

    def __init__(self, codes: EncodedCodes, steps: Mapping[str, Tensor]) -> None:
        self.codes, self._steps = codes, dict(steps)

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], streams: Mapping[str, EncodedPart], lines: View) -> Undecoded:
        """The parts of a grid with the bytes in the place of the codes that they have just been decoded to."""
        codes, steps = parts["codes"], {name: part for name, part in parts.items() if name != "codes"}
        return cls(EncodedCodes(streams, tuple(codes.shape), lines, codes.dtype), steps)

    def __getitem__(self, part: str) -> Tensor:
        """A part; codes are on the device of the steps."""
        return self.codes.decode().to(self._steps["step"].device) if part == "codes" else self._steps[part]

    def __iter__(self) -> Iterator[str]:
        """The names of the parts."""
        return iter(("codes", *self._steps))

    def __len__(self) -> int:
        """How many parts there are."""
        return 1 + len(self._steps)


def with_steps(parts: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parts of a grid with other tensors in the place of all but its codes."""
    return Undecoded(parts.codes, steps) if isinstance(parts, Undecoded) else {"codes": parts["codes"], **steps}
