"""What writers get: the tensors of a model by name, read one after the other, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pared.formats.groups.grid import Numbers
from pared.targets.target import Offer, Role


@dataclass(frozen=True)
class Outline:
    """A tensor that will be written, before its numbers are read.

    Args:
        name: in the source model's state dict.
        shape: the source tensor's.
        role: what it is to the runtime.
        offer: the format it gets; None: it stays in `dtype`.
        dtype: the name of the type it has, or is stored in where there is no offer: "float32", "bfloat16", "int64".
        names: all its names, where tensors are tied; the first is `name`.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    offer: Offer | None
    dtype: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """A model to be written.

    Args:
        outlines: every tensor, in order.
        read: the numbers of one of them: the parts of its grid ("codes", "step", ..., see `GroupGrid.shapes`); or
            {"values": ...}, of its shape and dtype. Called once for each tensor, in order, so that one is in memory at
            a time.
        config: the content of Hugging Face's config.json.
        folder: where tokenizer and generation settings are; None: nowhere.
        provenance: how it was made, plain data, for formats that have a place for it.
    """

    outlines: Sequence[Outline]
    read: Callable[[Outline], Mapping[str, Numbers]]
    config: Mapping[str, Any]
    folder: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
