"""What a search asks of whatever makes its models: in memory, or a file of one block after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import nn

from pared.allocate import Choice
from pared.artifact.outcome import Outcome

Made = TypeVar("Made")


@dataclass(frozen=True)
class OperatingPoint:
    """A point on the trade-off between bytes and damage: a model that can be built, and what is predicted of it.

    Args:
        choice: the option of each tensor whose step is free.
        damage: predicted share of the output's energy that is lost, activations included; above 0.
        nbytes: predicted size of `best_model.pt`.
    """

    choice: Choice
    damage: float
    nbytes: int

    @property
    def price(self) -> float:
        """The damage per byte at which the choice is optimal."""
        return self.choice.price


class Planner(Protocol):
    """Says which models can be made. `least` and `most` are the damages of the finest and of the smallest one."""

    @property
    def least(self) -> float:
        """See above."""
        ...

    @property
    def most(self) -> float:
        """See above."""
        ...

    def at_damage(self, damage: float) -> OperatingPoint:
        """The smallest plan whose predicted damage is at most this."""
        ...

    def within_bytes(self, nbytes: int) -> OperatingPoint:
        """The plan of least damage whose file is at most `nbytes` large, with what is known of its scores.

        Raises:
            ConfigError: even the smallest file is larger.
        """
        ...

    def contributors(self, point: OperatingPoint) -> list[tuple[str, float]]:
        """Tensors and inputs with their shares of the damage, the largest first; the shares add up to 1."""
        ...


class Maker(Planner, Protocol[Made]):
    """Makes the models of a search, lets them be scored, and keeps them."""

    def original(self) -> AbstractContextManager[nn.Module]:
        """The float model in eval mode, which the user's functions may change as they like."""
        ...

    def build(self, point: OperatingPoint) -> Made:
        """The model at an operating point."""
        ...

    def candidate(self, made: Made) -> AbstractContextManager[nn.Module]:
        """A model that was built, which the user's functions may change as they like."""
        ...

    def told(self, made: Made, outcome: Outcome) -> Made:
        """The same model, which knows how the search went."""
        ...

    def nbytes_of(self, point: OperatingPoint, made: Made) -> int:
        """The size of the file of a model that was built at an operating point."""
        ...

    def save(self, made: Made, directory: Path) -> Path:
        """Write a model, so that it can be read again; the file that it depends on."""
        ...

    def read(self, file: Path) -> Made:
        """The inverse of `save`."""
        ...
