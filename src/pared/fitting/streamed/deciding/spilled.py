"""What the tensors of a part could become, on the disk: options in one small file, what rounding needs in one for each.

Values are taken apart into tensors, numbers and texts, which torch reads without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pared.allocate import Options
from pared.files.disk import write_atomic
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.curves import RateCurve
from pared.fitting.rounding.feedback import Factor
from pared.fitting.rounding.targets import RoundingTarget
from pared.fitting.search.free.free import Free
from pared.fitting.search.free.offers import FreeUnit, coded_as
from pared.fitting.search.free.on_grids import FreeTensor, rounded, scaled
from pared.fitting.search.free.units import Unit
from pared.formats.coded import Coded
from pared.formats.views import View
from pared.model.contents import Decision
from pared.model.tensors import ModelTensor
from pared.targets.target import Offer

_CLASSES: Final = {cls.__name__: cls for cls in (Blocks, Decision, Factor, Options, RateCurve, RoundingTarget, View)}
_CLASS: Final = "class"
_ARRAY: Final = "ndarray"


@dataclass(frozen=True)
class Traced:
    """What is known after the sweeps of a tensor, or of several that must have the same format.

    Args:
        names: their first names.
        costs: the damage at a relative error of 1 of each; None where nothing was measured.
        free: their options; what rounding needs, and the tensors' numbers, are elsewhere. None: what becomes of it
            was decided by rule.
        decision: this, where it was.
    """

    names: tuple[str, ...]
    costs: tuple[float | None, ...]
    free: FreeTensor | FreeUnit | None
    decision: Decision | None


def bare(free: Free) -> FreeTensor | FreeUnit:
    """Options without tensors and what rounding them needs, so that they can be sent."""
    if isinstance(free, FreeTensor):
        return replace(free, model_tensor=_NOTHING, target=_NOTHING)
    assert isinstance(free, FreeUnit), "there are no others"
    return replace(free, unit=replace(free.unit, tensors=()), targets=())


def counted(free: FreeTensor | FreeUnit, factors: Mapping[str, float]) -> Free:
    """The same where each tensor's damage is multiplied by its factor."""
    return scaled(free, factors[free.model_tensor.name]) if isinstance(free, FreeTensor) else free.corrected(factors)


def rounded_as(free: Free, model_tensor: ModelTensor, target: RoundingTarget, option: int) -> Coded:
    """Round a tensor as an option says.

    Args:
        free: the options.
        model_tensor: the tensor, or one of them, loaded.
        target: what rounding it needs.
        option: the option.
    """
    if isinstance(free, FreeTensor):
        return rounded(replace(free, model_tensor=model_tensor, target=target), option)
    assert isinstance(free, FreeUnit), "there are no others"
    return coded_as(model_tensor, target, free.unit.offers[option])


def spill(path: Path, target: RoundingTarget) -> None:
    """Write what rounding a tensor needs."""
    write(path, replace(target, matrix=torch.empty(0)))


def target_in(path: Path, model_tensor: ModelTensor) -> RoundingTarget:
    """What rounding a tensor needs.

    Args:
        path: as `spill` wrote it.
        model_tensor: the tensor, loaded.
    """
    target: RoundingTarget = read(path)
    return replace(target, matrix=target.view.matrix(model_tensor.tensor.detach().float()).contiguous())


def write_traced(path: Path, found: list[Traced]) -> None:
    """Write what is known of the tensors of a part."""
    write(path, tuple({**vars(one), "free": None if one.free is None else _light(one.free)} for one in found))


def read_traced(path: Path, tensors: Mapping[str, ModelTensor], offers: Sequence[Offer]) -> list[Traced]:
    """The inverse of `write_traced`.

    Args:
        path: the file.
        tensors: those of the model, by their first names; their numbers are not looked at.
        offers: the formats of the runtime that is fitted for.
    """
    known = {offer.name: offer for offer in offers}
    return [
        Traced(**{**one, "free": _whole(one["free"], [tensors[name] for name in one["names"]], known)})
        for one in read(path)
    ]


def _light(free: FreeTensor | FreeUnit) -> dict[str, Any]:
    """Options without tensors, and without what rounding them needs."""
    if isinstance(free, FreeTensor):
        return {one.name: getattr(free, one.name) for one in fields(free) if one.name not in ("model_tensor", "target")}
    offers = tuple(offer.name for offer in free.unit.offers)
    return {"offers": offers, "why": free.unit.because, "damages": free.damages, "because": free.because}


def _whole(
    light: dict[str, Any] | None, tensors: Sequence[ModelTensor], offers: Mapping[str, Offer]
) -> FreeTensor | FreeUnit | None:
    if light is None:
        return None
    if "offers" not in light:
        return FreeTensor(model_tensor=tensors[0], target=_NOTHING, **light)
    unit = Unit(tuple(tensors), tuple(offers[name] for name in light["offers"]), light["why"])
    return FreeUnit(unit, (), light["damages"], light["because"])


_NOTHING: Final[Any] = None  # until it is read


def write(path: Path, value: object) -> None:
    """Write a value of the classes here."""
    write_atomic(path, lambda file: torch.save(_plain(value), file))


def read(path: Path) -> Any:
    """The inverse of `write`."""
    return _made(torch.load(path, weights_only=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (
            value.detach().contiguous().clone() if value.untyped_storage().nbytes() != value.nbytes else value.detach()
        )
    if isinstance(value, np.ndarray):
        return {_CLASS: _ARRAY, "array": torch.from_numpy(np.array(value, order="C"))}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        return {_CLASS: type(value).__name__, **{one.name: _plain(getattr(value, one.name)) for one in fields(value)}}
    if isinstance(value, (tuple, list)):
        return tuple(_plain(one) for one in value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written")


def _made(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_made(one) for one in value)
    if not isinstance(value, dict):
        return value
    known = {key: _made(one) for key, one in value.items() if key != _CLASS}
    if _CLASS not in value:
        return known
    if value[_CLASS] == _ARRAY:
        return value["array"].numpy()
    return _CLASSES[value[_CLASS]](**known)
