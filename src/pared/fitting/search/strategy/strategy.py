"""The next operating point to try, and when no further trial is worth making."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pared.artifact.outcome import Trial
from pared.fitting.search.maker import OperatingPoint, Planner
from pared.fitting.search.strategy.laws import Law, fit_law, loss_of

# After the first trial, the next must promise a file smaller by this share, which grows by this factor with each
# further trial, from a fifth trial on by the next factor as well (four trials did not do, so the score is rough), and
# where the score is noisy: by the last factor for a standard error as large as the tolerable loss.
_MIN_SAVING: Final = 0.01
_MIN_SAVING_GROWTH: Final = 1.5
_MIN_SAVING_GROWTH_LATER: Final = 1.3
_MIN_SAVING_NOISE: Final = 4.0

# Steps in log damage: the largest step to where nothing is known yet; the step up where the loss is lost in noise; the
# least step down from a failure, which is three times as long with each further failure; the step down from a second
# failure that lost no less than the first; the least step up from one good trial.
_MAX_STEP: Final = math.log(10)
_STEP_DOWN_IN_NOISE: Final = math.log(50)
_STEP_UP_IN_NOISE: Final = math.log(8)
_MIN_STEP_DOWN: Final = math.log(1.25)
_MIN_STEP_UP: Final = math.log(1.6)
_MAX_FAILURES: Final = 4  # then the finest model is tried

# Of planned bytes, beyond which the finest model is tried: real bytes differ a little, and it is known to fit.
_FINEST_SHARE: Final = 0.995


@dataclass(frozen=True)
class Strategy:
    """Says which operating point to try next: a pure function of the finished trials.

    Args:
        planner: makes operating points.
        finest: the operating point of least damage that may be tried.
        start: the damage of the first trial.
        tolerable_loss: in the unit of the trials' losses.
    """

    planner: Planner
    finest: OperatingPoint
    start: float
    tolerable_loss: float

    def next(self, trials: Sequence[Trial]) -> OperatingPoint | None:
        """The next operating point; None if no further trial is worth making."""
        if not trials:
            return self._point(math.log(self.start))
        good, bad = _bracket(trials)
        law = fit_law(trials, self.tolerable_loss)
        if good is None:
            assert bad is not None, "a trial is good or bad"
            return None if bad.damage <= self.finest.damage else self._finer(bad, law, len(trials))
        if law is not None and law.trials > 1 and not law.flat and loss_of(good) >= law.close:
            return None
        point = self._point(_coarser(good, law) if bad is None else _between(good, bad, law, trials))
        noise = (good.standard_error or 0.0) / (self.tolerable_loss or math.inf)
        growth = _MIN_SAVING_GROWTH ** (len(trials) - 1) * _MIN_SAVING_GROWTH_LATER ** max(0, len(trials) - 4)
        min_saving = _MIN_SAVING * growth * (1 + _MIN_SAVING_NOISE * noise)
        return point if point.nbytes < (1 - min_saving) * self._point(math.log(good.damage)).nbytes else None

    def _point(self, log_damage: float) -> OperatingPoint:
        """The operating point at a log damage, within the range."""
        damage = min(math.exp(log_damage), self.planner.most)
        if damage <= self.finest.damage:
            return self.finest
        point = self.planner.at_damage(damage)
        return self.finest if point.nbytes > _FINEST_SHARE * self.finest.nbytes else point

    def point_of(self, trial: Trial) -> OperatingPoint:
        """The operating point of a trial, of this run or of an earlier one."""
        return self.finest if trial.damage == self.finest.damage else self.planner.at_damage(trial.damage)

    def _finer(self, bad: Trial, law: Law | None, failures: int) -> OperatingPoint:
        """Everything has failed so far: go down by ever larger steps, and soon to the end of the range."""
        flat = law is not None and law.flat
        if failures >= _MAX_FAILURES or (failures > 1 and law is None) or (failures > 2 and flat):
            return self.finest
        known = math.log(bad.damage)
        if failures > 1 and flat:
            return self._point(known - _STEP_DOWN_IN_NOISE)
        aimed = law.log_damage if law is not None else known - _MAX_STEP
        return self._point(min(aimed, known - _MIN_STEP_DOWN * 3 ** (failures - 1)))


def _bracket(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """The good trial of most damage, and the bad one of least damage above it."""
    good = max((trial for trial in trials if trial.met), key=lambda trial: trial.damage, default=None)
    floor = 0.0 if good is None else good.damage
    bad = min(
        (trial for trial in trials if not trial.met and trial.damage > floor),
        key=lambda trial: trial.damage,
        default=None,
    )
    return good, bad


def _coarser(good: Trial, law: Law | None) -> float:
    """Nothing has failed so far: the log damage where the law says, but not too far beyond what is known."""
    known = math.log(good.damage)
    if law is None or law.flat:
        return known + _STEP_UP_IN_NOISE
    # One trial says nothing of the slope: even if its loss is near the aim, the aim may be a long way off.
    least = _MIN_STEP_UP if law.trials == 1 else 0.0
    return known + min(max(law.log_damage - known, least), _MAX_STEP)


def _between(good: Trial, bad: Trial, law: Law | None, trials: Sequence[Trial]) -> float:
    """The log damage where the law says, if that is inside the bracket and the bracket halves in two trials.

    Otherwise the middle of the bracket. A flat law says nothing: then a line of slope 1 from the failed side.
    """
    low, high = math.log(good.damage), math.log(bad.damage)
    first, last = _bracket(trials[:-2])
    too_slow = first is not None and last is not None and high - low > math.log(last.damage / first.damage) / 2
    aimed = law.log_damage if law is not None else low
    if law is not None and law.flat:
        aimed = high - max(math.log(loss_of(bad) / law.aim), _MIN_STEP_DOWN)
    return (low + high) / 2 if too_slow or not low < aimed < high else aimed
