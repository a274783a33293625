"""How a counterpart treats its input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from pared.errors import CalibrationError

Outliers = tuple[tuple[int, int], ...]

NARROWEST: Final = 1e-30  # the narrowest range: keeps scales and their reciprocals finite and normal in float32

_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Range:
    """The interval in which activations were seen. It includes zero, so that zeros, as in padding, are exact.

    Args:
        low: at most 0.
        high: at least 0.

    Raises:
        CalibrationError: an end is not finite in float32, or zero lies outside.

    >>> Range.of(0.5, 2.0)
    Range(low=0.0, high=2.0)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -_LARGEST <= self.low <= 0.0 <= self.high <= _LARGEST:
            raise CalibrationError(
                f"the activations' range {self.low:g} to {self.high:g} is not finite or does not include zero",
                remedy="Look for NaN or Inf in the calibration data; Range.of widens a range to include zero.",
            )

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """The smallest range that includes `low`, `high` and zero."""
        return cls(min(low, 0.0), max(high, 0.0))

    def grid(self, levels: int) -> tuple[float, int]:
        """The scale (a float32 number) and the zero point at which codes 0..levels span the range.

        >>> Range(-1.0, 3.0).grid(4)
        (1.0, 1)
        """
        return _grid(self.low, self.high, levels)


@functools.lru_cache(maxsize=4096)
def _grid(low: float, high: float, levels: int) -> tuple[float, int]:
    scale = float32(max(high - low, NARROWEST) / levels)
    return scale, min(round(-low / scale), levels)


def float32(value: float) -> float:
    """The nearest number of float32."""
    return float(np.float32(value))


Mode = Literal["static", "dynamic", "gather"]


@dataclass(frozen=True)
class Activation:
    """How a counterpart treats its input; it is stored in the artifact, so results do not depend on a measurement.

    Args:
        mode: "static": u8 over the range `low` to `high`; "dynamic": u8 over the range of each call; "gather": the
            input is indices into a table of codes.
        low: the smallest input seen in calibration, at most 0; only for "static".
        high: the largest, at least 0; only for "static".
        weights: the attributes of the module that are kept as codes.
        outliers: columns of the input that leave the range, each with its number of extra ranges, negative
            below the range; only for "static".

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
