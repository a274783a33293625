"""What the allocation decides about, whatever its formats are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pared.allocate import Options
from pared.formats.coded import Coded
from pared.model.contents import Contents, Decision, Plan
from pared.model.tensors import ModelTensor


class Free(Protocol):
    """A tensor whose format the allocation decides, or several that must have the same format."""

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """The tensors."""
        ...

    @property
    def options(self) -> Options:
        """Bytes and damage of each option, of all tensors together."""
        ...

    @property
    def held(self) -> tuple[tuple[Coded, ...], float]:
        """The tensors in some format that takes no time to make, and their bytes as `options` counts them."""
        ...

    def decisions(self, option: int) -> tuple[Decision, ...]:
        """What an option means for each tensor, with its damage."""
        ...

    def coded(self, option: int) -> tuple[Coded, ...]:
        """Each tensor, rounded as an option says."""
        ...

    def corrected(self, factors: Mapping[str, float]) -> Free:
        """The same where every option of some tensors, by their first names, does this many times the damage."""
        ...


@dataclass(frozen=True, eq=False)
class Choices:
    """What can be chosen for a model.

    Args:
        plan: one decision for each of its tensors, in order; those of free ones are replaced.
        fixed: the tensors that are not free, by their first names.
        free: what the allocation decides about.
        nbytes: the size of the file that holds some contents.
        exact: whether the options count bytes exactly, so that nothing need be rounded to know a size.
    """

    plan: Plan
    fixed: Mapping[str, Coded]
    free: Sequence[Free]
    nbytes: Callable[[Contents], int]
    exact: bool = False


def name_of(free: Free) -> str:
    """Its name in messages: that of its first tensor."""
    more = len(free.tensors) - 1
    return free.tensors[0].name + (f" and {more} alike" if more else "")
