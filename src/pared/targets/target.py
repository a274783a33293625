"""What a runtime executes: formats by kind of layer, their exact bytes, and which tensors must be alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from pared.formats.groups.grid import GroupGrid, StepType

# What a weight is to a runtime: the matrix of a linear layer, the table of an embedding, the head that makes logits (a
# linear layer that is not in a block), or anything else, which stays in a floating type.
Role = Literal["linear", "table", "head", "other"]


_STACKED: Final = 3  # the dimensions of a stack of matrices
_NARROWEST: Final = 16  # rows and columns of a matrix: convolutions have fewer


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a tensor is a stack of matrices, as those of experts, which no runtime here takes in another format.

    >>> is_stack((8, 256, 128)), is_stack((256, 128, 3)), is_stack((256, 128))
    (True, False, False)
    """
    return len(shape) == _STACKED and min(shape[1:]) >= _NARROWEST


@dataclass(frozen=True)
class Offer:
    """One format in which a runtime takes weights.

    Args:
        name: as the runtime calls it: "Q4_K", "W4A16 g128".
        grid: the numbers; or the name of a floating type.
        nbytes: the exact bytes of a matrix of (rows, columns) in the runtime's file, with scales and padding.
        multiple: the number of columns must be a multiple of this.
        roles: which weights may have it.
        row_multiple: the number of rows must be a multiple of this.
        negative: whether the runtime takes negative steps where zero is fixed.
        also: a type that has to hold steps and least values as well as the grid's does; None: none.
    """

    name: str
    grid: GroupGrid | Literal["float16", "bfloat16", "float32"]
    nbytes: Callable[[int, int], int]
    multiple: int = 1
    roles: frozenset[Role] = frozenset(("linear",))
    row_multiple: int = 1
    negative: bool = False
    also: StepType | None = None

    def takes(self, role: Role, columns: int, rows: int = 0) -> bool:
        """Whether a matrix may have this format."""
        return role in self.roles and columns % self.multiple == 0 and rows % self.row_multiple == 0


@dataclass(frozen=True)
class Target:
    """A runtime, or the family of runtimes that read one layout.

    Args:
        name: as users write it: "gguf".
        title: as tables show it: "GGUF: llama.cpp, Ollama, ...".
        extra: what to install: the name of an extra of pared, empty if none is needed.
        packages: the packages that this extra brings, by the name they are imported under.
        offers: the formats, from fine to coarse.
        alike: parts of names of modules whose weights must have the same format within one block: a runtime joins
            them. ("q_proj", "k_proj", "v_proj") for instance.
        takes: "weights": its files hold tensors by name, for architectures that the runtime knows; "graph": they hold
            a captured call.
        by_family: its files follow the architecture: only `FAMILIES` can be written, and only what they use.
        parts: how many tensors of its files a weight becomes, at most: codes, steps, ...
        steps_of: the type in which the runtime has steps and least values, by the type in which a model computes; None:
            that of each grid.
    """

    name: str
    title: str
    extra: str
    packages: tuple[str, ...]
    offers: tuple[Offer, ...]
    alike: tuple[tuple[str, ...], ...] = ()
    takes: Literal["weights", "graph"] = "weights"
    by_family: bool = False
    parts: int = 1
    steps_of: Callable[[str], StepType] | None = None

    def for_model(self, dtype: str) -> Target:
        """The same with steps and least values that it holds exactly for a model that computes in a type.

        >>> from pared.targets.table import TARGETS
        >>> [TARGETS["mlx"].for_model(dtype).offers[0].also for dtype in ("bfloat16", "float16")]
        [None, 'float16']
        """
        if self.steps_of is None:
            return self
        kind = self.steps_of(dtype)
        offers = tuple(
            offer if isinstance(offer.grid, str) or offer.grid.step == kind else replace(offer, also=kind)
            for offer in self.offers
        )
        return replace(self, offers=offers)

    def offers_for(self, role: Role, columns: int, rows: int = 0) -> tuple[Offer, ...]:
        """The formats that a matrix may have, from fine to coarse."""
        return tuple(offer for offer in self.offers if offer.takes(role, columns, rows))
