"""How a counterpart treats its input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from pared.kernels.activation import Range
from pared.kernels.outliers import Outliers

Mode = Literal["static", "dynamic", "gather"]


@dataclass(frozen=True)
class Activation:
    """How a counterpart treats its input; it is stored in the artifact, so results do not depend on a measurement.

    Args:
        mode: "static": u8 over the range `low` to `high`; "dynamic": u8 over the range of each call; "gather": the
            input is indices into a table of codes.
        low: the least input seen in calibration, 0 at most; only for "static".
        high: the greatest, 0 at least; only for "static".
        weights: the module's attributes that stay in codes.
        outliers: columns of the input that leave the range; only for "static".

    >>> Activation.from_json(Activation("static", -1.0, 2.0, outliers=((7, 2),)).to_json())
    Activation(mode='static', low=-1.0, high=2.0, weights=('weight',), outliers=((7, 2),))
    """

    mode: Mode
    low: float = 0.0
    high: float = 0.0
    weights: tuple[str, ...] = ("weight",)
    outliers: Outliers = ()

    @functools.cached_property
    def span(self) -> Range:
        """The calibrated range, as the kernels take it."""
        return Range(self.low, self.high)

    def to_json(self) -> dict[str, Any]:
        """As it stands in an artifact's index."""
        data: dict[str, Any] = {"mode": self.mode}
        if self.mode == "static":
            data |= {"low": self.low, "high": self.high}
        if self.outliers:
            data["outliers"] = [list(one) for one in self.outliers]
        return data if self.weights == ("weight",) else {**data, "weights": list(self.weights)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Activation:
        """The inverse of `to_json`."""
        outliers = tuple((column, count) for column, count in data.get("outliers", ()))
        return cls(**{**data, "weights": tuple(data.get("weights", ("weight",))), "outliers": outliers})
