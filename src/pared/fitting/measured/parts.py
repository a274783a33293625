"""Calls with the first samples of recorded ones, where the model gives for these what it gave for all of them.

What a call shows of the model's code, one sample shows in a fraction of the time.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch
from torch import nn

from pared.errors import reason_of
from pared.fitting.calibration.observe import Statistics
from pared.model.calls import Call, first_samples, smallest_like_first
from pared.model.copies import shadow
from pared.model.outputs import EVERY, Leaf, leaves_of
from pared.switches import ignoring, random_states_kept

log = logging.getLogger(__name__)

# A call is cut where it has this many times the samples: it has to be made once more to see whether that is right.
_WORTH: Final = 2
_SAME: Final = 1e-3  # share of the energy by which the output of samples may differ alone and among others


def small_call(model: nn.Module, seen: Statistics) -> Call:
    """The first sample of the smallest call like the first, or all of its samples.

    Args:
        model: it is left as it is; a copy runs.
        seen: what calibration saw.
    """
    whole = smallest_like_first(seen.calls)
    found = _part(model, seen, seen.calls.index(whole), 1)
    return whole if found is None else found[0]


def of_samples(model: nn.Module, seen: Statistics, count: int) -> Statistics:
    """What calibration saw of about that number of samples, of the first ones of a call where a call has more.

    Args:
        model: it is left as it is; a copy runs.
        seen: what calibration saw.
        count: the number of samples.
    """
    some = seen.some(count)
    may_be_cut = len(some.calls) == 1 and some.samples >= _WORTH * count
    found = _part(model, some, 0, count) if may_be_cut else None
    if found is None:
        return some
    call, leaves = found
    return replace(
        some,
        samples=count,
        calls=(call,),
        energies_of_calls=({leaf.key: leaf.energy() for leaf in leaves},),
        samples_of_calls=(count,),
        outputs_of_calls=(),
    )


def _part(model: nn.Module, seen: Statistics, place: int, count: int) -> tuple[Call, list[Leaf]] | None:
    """A call with its first samples, and its outputs; None if these are not known to be those of the whole call."""
    whole = seen.calls[place]
    part = first_samples(whole, count) if seen.outputs_of_calls else None
    if part is None:
        return None
    try:
        with torch.no_grad(), ignoring(), random_states_kept():
            leaves = leaves_of(part.on(shadow(model)), EVERY, whole.task)
    except Exception as error:  # noqa: BLE001  # nobody asked for this call
        log.debug("a call cannot be made with its first samples: %s", reason_of(error))
        return None
    found, known = ([leaf for leaf in of if not leaf.is_logits] for of in (leaves, seen.outputs_of_calls[place]))
    total = seen.samples_of_calls[place]
    if [leaf.path for leaf in found] != [leaf.path for leaf in known]:
        return None
    return (part, leaves) if all(_is_first(a, b, total) for a, b in zip(found, known, strict=True)) else None


def _is_first(found: Leaf, known: Leaf, total: int) -> bool:
    """Whether an output is that of the first samples of a call."""
    if not known.value.dim() or len(known.value) != total:
        return False
    expected = replace(known, value=known.value[: len(found.value)] if found.value.dim() else known.value)
    return found.value.shape == expected.value.shape and expected.error(found.value) <= _SAME * expected.energy()
