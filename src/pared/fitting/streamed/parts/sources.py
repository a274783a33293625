"""Which tensors of a checkpoint a model's tensor is made of, where transformers has another layout than the files.

Mixtures of experts are stored with a matrix for each expert, and run as one stack of them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pared.errors import FileError, reason_of

_REMEDY = "Check the folder: transformers could not open it either."


@dataclass(frozen=True, eq=False)
class Joined:
    """A tensor that is made of others, or is a part of another one.

    Args:
        name: its name in the model.
        leader: the first tensor that its converter makes: this one, or another of the same pieces.
        pieces: names in the checkpoint, in order, each with the pattern by which the converter knows it.
        converter: one of transformers.
    """

    name: str
    leader: str
    pieces: tuple[tuple[str, str], ...]
    converter: Any

    def made(self, model: nn.Module, read: Callable[[str], Tensor]) -> Tensor:
        """Make it.

        Args:
            model: whose configuration transformers may ask.
            read: gives the numbers of a tensor in the checkpoint.

        Raises:
            FileError: transformers cannot make it of these pieces.
        """
        converter = copy.deepcopy(self.converter)
        for piece, pattern in self.pieces:
            converter.add_tensor(self.leader, piece, pattern, read(piece))
        language: Any = model
        try:
            made = converter.convert(self.leader, model=model, config=language.config)
            found: Tensor | list[Tensor] = made[self.name]
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise FileError(
                f"transformers cannot make it of {len(self.pieces)} tensors such as {self.pieces[0][0]}: "
                f"{reason_of(error)}",
                where=self.name,
                remedy=_REMEDY,
            ) from error
        return found[0] if isinstance(found, list) else found


def sources_of(model: nn.Module, held: Collection[str]) -> dict[str, str | Joined]:
    """Where transformers finds each tensor of a model: its name in the checkpoint, or what it is made of.

    Args:
        model: one of transformers; its numbers are not looked at.
        held: the names in the checkpoint.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, str | Joined] = {}
    gathered: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(held, key=loading.dot_natural_key):
        target, pattern = loading.apply_converters(loading.apply_renamings(name, renamings), converters)
        if pattern is None:
            found[target] = name
        else:
            gathered.setdefault(target, []).append((name, pattern))
    for leader, pieces in gathered.items():
        converter = by_pattern[pieces[0][1]]
        for pattern in converter.target_patterns:
            target = leader.replace(converter.target_patterns[0], pattern)
            found[target] = Joined(target, leader, tuple(pieces), converter)
    return found
