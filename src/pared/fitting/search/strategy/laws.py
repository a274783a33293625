"""How the loss depends on the damage, as far as finished trials tell.

Near the float model most losses are `c * damage ** slope`; a score in decibels loses `a + b * log(damage)`. Trials say
which of the two laws holds (`docs/decisions/031-two-laws-of-loss.md`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.artifact.outcome import Trial
from pared.fitting.search.evaluate import deciding_loss

# A trial aims at this share of the tolerable loss, less one standard error, so that an error of the fit does not fail
# the trial; never below the second share. A model whose loss comes this close to the aim ends the search. Of the
# logarithmic law these are shares of the damage.
_AIM: Final = 0.92
_LOWEST_AIM: Final = 0.5
_CLOSE_TO_AIM: Final = 0.85

# Slopes of the fitted law that are believed.
_MIN_SLOPE: Final = 0.3
_MAX_SLOPE: Final = 3.0

# Standard deviations of the measured log loss from the law: near the aim, and as a share of the distance far from it.
_DEVIATION_NEAR: Final = 0.03
_DEVIATION_FAR: Final = 0.25


def loss_of(trial: Trial) -> float:
    """The loss that decides whether a trial met the criterion."""
    return deciding_loss(trial.loss, trial.unseen)


@dataclass(frozen=True)
class Law:
    """How the loss depends on the damage, fitted.

    Args:
        log_damage: where the loss is at the aim.
        aim: a loss, not above the tolerable one.
        close: a loss so close to the aim that the search ends.
        trials: how many the law was fitted to.
        flat: whether the loss hardly falls with the damage, so that `log_damage` is a guess.
    """

    log_damage: float
    aim: float
    close: float
    trials: int
    flat: bool


def fit_law(trials: Sequence[Trial], tolerable_loss: float) -> Law | None:
    """Fit a law to all trials whose loss stands out of the noise; None if there are none.

    A power law, unless its exponent is so small that the loss grows by steps rather than by factors: then the
    logarithmic law, if the loss of every such trial stands out from that of the next finer one.
    """
    clear = sorted(
        (trial for trial in trials if loss_of(trial) > 2 * (trial.standard_error or 0.0)),
        key=lambda trial: trial.damage,
    )
    if not clear or tolerable_loss <= 0:
        return None
    law = _power(clear, tolerable_loss)
    return (_logarithmic(clear, tolerable_loss) or law) if law.flat else law


def _power(clear: Sequence[Trial], tolerable_loss: float) -> Law:
    """`loss = c * damage ** slope`.

    It is the weighted least-squares line of the logarithms whose slope has a prior of 1 +- 1: one trial gives a line of
    slope 1, two exact ones give nearly the secant, and of many those near the aim count most.
    """
    nearest = min(clear, key=lambda trial: abs(math.log(loss_of(trial) / tolerable_loss)))
    aim = max(_LOWEST_AIM * tolerable_loss, _AIM * tolerable_loss - (nearest.standard_error or 0.0))
    losses = np.array([loss_of(trial) for trial in clear])
    x = np.array([math.log(trial.damage) for trial in clear])
    y = np.log(losses / aim)
    noise = np.array([trial.standard_error or 0.0 for trial in clear]) / losses
    weight = 1 / (_DEVIATION_NEAR**2 + (_DEVIATION_FAR * y) ** 2 + noise**2)
    x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
    variance, covariance = weight @ (x - x_mean) ** 2, weight @ ((x - x_mean) * (y - y_mean))
    slope = float((covariance + 1) / (variance + 1))
    bounded = min(max(slope, _MIN_SLOPE), _MAX_SLOPE)
    return Law(float(x_mean - y_mean / bounded), aim, _CLOSE_TO_AIM * aim, len(clear), slope < _MIN_SLOPE)


def _logarithmic(clear: Sequence[Trial], tolerable_loss: float) -> Law | None:
    """`loss = a + b * log(damage)`, by the two clear trials around the tolerable loss, or those nearest to it.

    A ratio of signal to error in decibels is exactly that where the error's energy is the damage: b is then 10 / ln 10.

    Args:
        clear: trials in the order of their damage.
        tolerable_loss: in the unit of their losses.

    Returns:
        None if the trials do not say what `b` is: there is one, or the losses do not rise from each to the next.
    """
    if len(clear) < 2 or not all(map(_rises, clear, clear[1:])):
        return None
    upper = next((i for i, trial in enumerate(clear) if i and loss_of(trial) > tolerable_loss), len(clear) - 1)
    low, high = clear[upper - 1], clear[upper]
    rise = loss_of(high) - loss_of(low)
    b = rise / math.log(high.damage / low.damage)
    aim = tolerable_loss + b * math.log(_AIM) - (low.standard_error or 0.0)
    log_damage = math.log(low.damage) + (aim - loss_of(low)) / b
    return Law(log_damage, aim, aim + b * math.log(_CLOSE_TO_AIM), len(clear), flat=False)


def _rises(low: Trial, high: Trial) -> bool:
    noise = math.hypot(low.standard_error or 0.0, high.standard_error or 0.0)
    return loss_of(high) - loss_of(low) > 2 * noise
