"""Whether what answers calls in place of the modules, such as a graph, is as accurate as what the search has scored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

from torch import nn

from pared.artifact.outcome import Damage
from pared.errors import EvaluationError
from pared.fitting.measured.repair import is_far
from pared.fitting.search.search import Judgement
from pared.model.tensors import ModuleT
from pared.runtime.profile.profile import Profile
from pared.runtime.record import record_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """What was found out about a model as it runs.

    Args:
        damage: what it loses on calibration calls.
        against: why it may not run so; empty if it may.
        score: what `eval_func` gave for it; None if it was not called.
    """

    damage: Damage
    against: str = ""
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Checker(Generic[ModuleT]):
    """Finds the fastest form of a model that is accurate enough.

    The search has scored it layer by layer, with every layer in int8 that may be. A layer that is faster in float32 or
    bfloat16 rounds its input less than that, so the score stands; what joins layers, or is another runtime's, rounds
    elsewhere, and is scored once more.

    Args:
        found: the model as the search has scored it, which is not called.
        made: makes the model for a profile, for one use: calls and the user's functions may change it.
        damage_of: measures the damage of a model, and may change it.
        judged: scores a model, and may change it; None if scores do not decide.
    """

    found: ModuleT
    made: Callable[[Profile], ModuleT]
    damage_of: Callable[[ModuleT], Damage]
    judged: Callable[[nn.Module], Judgement] | None

    def accurate(self, profile: Profile) -> tuple[Profile, Damage]:
        """The profile without the forms that are not accurate enough, with a score; and the damage of what runs."""
        while True:
            check = self._check(profile)
            if not check.against:
                return replace(profile, score=check.score), check.damage
            # One by one: others than bfloat16 first, which is closest to floats where it answers beside them.
            form = next((one for one in profile.forms if one not in ("bfloat16", "float32")), profile.forms[0])
            log.info("no %s: %s", form, check.against)
            profile = profile.without(form, check.against)

    def _check(self, profile: Profile) -> Check:
        damage = self.damage_of(self.made(profile))
        if set(profile.forms) <= {"float32"}:  # it is tried last, so that the first can be given up
            return Check(damage)
        if is_far(damage):
            return Check(damage, "it does far more damage than predicted")
        if self.judged is None:
            return Check(damage)
        try:
            judgement = self.judged(self.made(profile))
        except EvaluationError as error:  # the search has not seen this form, which is not worth a finished search
            return Check(damage, f"eval_func {error.what}")
        outcome = record_of(self.found).outcome
        known = next((trial.loss for trial in outcome.trials if trial.score == outcome.score), judgement.seen.loss)
        if judgement.met or (not outcome.met and judgement.seen.loss <= known):
            return Check(damage, score=judgement.score)
        return Check(damage, f"the criterion is not met by it, at a score of {judgement.score:.6g}")
