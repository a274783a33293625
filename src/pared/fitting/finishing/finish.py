"""The end of `fit`: the fastest form of the result that is accurate enough, and a look at what its file will give."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from pared.artifact.outcome import Damage
from pared.errors import reason_of
from pared.fitting import speed
from pared.fitting.finishing.forms import Checker
from pared.fitting.measured.repair import Corrections, Refiner, reported
from pared.fitting.preparation import Prepared
from pared.fitting.search.search import Judgement
from pared.fitting.verification.reloading import check_reloading
from pared.model.tensors import ModuleT
from pared.runtime.profile.timings import ModelTiming
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of, record_of, set_outcome
from pared.targets.table import OWN
from pared.terminal import Stages

log = logging.getLogger(__name__)


def finished(
    found: ModuleT,
    known: Prepared[ModuleT],
    stages: Stages,
    refiner: Refiner[ModuleT] | None,
    corrections: Corrections,
    judged: Callable[[nn.Module], Judgement] | None = None,
) -> ModuleT:
    """The same model in the fastest form that is accurate enough, with the damage that it then does.

    Args:
        found: what was found.
        known: what it was made from.
        stages: shows progress.
        refiner: measures damage; None without calibration data.
        corrections: what was corrected on the way.
        judged: scores a model, and may change it; None if scores do not decide.

    Raises:
        ModelError: its file would give another model.
    """
    if refiner is None:
        damage = Damage(notes=("no damage was measured: there are no calibration data",))
    else:
        timed = _timed(found, known, stages) if known.conf.target == OWN else None
        with stages.stage("measuring the result"):
            if timed is None:
                measured = refiner.damage_of(copy.deepcopy(found))
            else:
                found, measured = _fastest(found, known, timed, refiner, judged)
            damage = reported(measured, corrections)
    verify(found, known, stages)
    set_outcome(found, replace(record_of(found).outcome, damage=damage))
    return found


def _timed(found: nn.Module, known: Prepared[ModuleT], stages: Stages) -> speed.Timed | None:
    """What is fastest on this machine; None if nothing can be timed."""
    assert known.seen is not None, "there is a refiner"
    try:
        with stages.stage("timing"):
            return speed.timed(known.tensors, contents_of(found), known.seen)
    except Exception as error:  # noqa: BLE001  # whatever it is, times are not worth a finished search
        _run_by_layers(found, f"its calls could not be timed: {reason_of(error)}")
        return None


def _run_by_layers(found: nn.Module, because: str) -> None:
    """Say why nothing faster answers the calls of a model as it was found."""
    log.warning("the model runs layer by layer: %s", because)
    record = record_of(found)
    record.profile = replace(record.profile, model=ModelTiming(because=because))


def _fastest(
    found: ModuleT,
    known: Prepared[ModuleT],
    timed: speed.Timed,
    refiner: Refiner[ModuleT],
    judged: Callable[[nn.Module], Judgement] | None,
) -> tuple[ModuleT, Damage]:
    """The model in the fastest form that is accurate enough, and the damage that it does so."""
    contents = contents_of(found)
    checker = Checker(
        found,
        lambda profile: assemble(known.tensors, contents, profile, captures=timed.captures),
        refiner.damage_of,
        judged,
    )
    try:
        profile, damage = checker.accurate(timed.profile)
        fastest = replace(timed, profile=profile).assembled(known.tensors, contents)
    except Exception as error:  # noqa: BLE001  # whatever it is, a faster form is not worth a finished search
        _run_by_layers(found, f"it could not be made faster: {reason_of(error)}")
        return found, refiner.damage_of(copy.deepcopy(found))
    old, new = record_of(found), record_of(fastest)
    new.outcome, new.curve = old.outcome, old.curve
    return fastest, damage


def verify(found: nn.Module, known: Prepared[ModuleT], stages: Stages) -> None:
    """Refuse a model whose file would give another one, where there is a call to compare them by."""
    if known.seen is not None:
        with stages.stage("verifying"):
            check_reloading(found, known.tensors, known.seen.calls)
