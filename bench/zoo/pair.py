"""What the bench of the search knows of a model: how to load, calibrate and score it, and how much it may lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pared import AccuracyCriterion
from pared.model.calls import Calibration

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """A public model with the data that judge it. The seed chooses the splits, or what is drawn.

    Args:
        load: the FP32 model, in eval mode.
        calibration: for `pared.fit`, from a seed; shares nothing with the two sets that are scored.
        scores: of a model, one per independent sample, on one of two disjoint sets, from a seed. Their mean is what
            the criterion is about.
        criterion: with the least loss that is tolerated.
        widened: whether two paired standard errors are tolerated where they are more.
        metrics: of a model, printed beside the result, from a seed.
        note: what a reader has to know.
    """

    name: str
    load: Callable[[], nn.Module]
    calibration: Callable[[int], Calibration]
    scores: Callable[[nn.Module, Literal["search", "test"], int], Scores]
    criterion: AccuracyCriterion
    metrics: Callable[[nn.Module, int], Mapping[str, float]]
    note: str
    widened: bool = True
