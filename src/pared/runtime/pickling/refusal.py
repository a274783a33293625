"""Names what in a model cannot be pickled; pickle itself names only the class of it."""

from __future__ import annotations

import pickle
import sys
from types import FrameType
from typing import Final

from torch import nn

from pared.errors import ModelError
from pared.model.copying.reach import Reach

_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")
_REMEDY: Final = (
    "Set the attribute to None before, use functions and classes that can be imported, or hand on the file: "
    "pared.save(model, directory), and pared.load(directory, model=build_model())."
)


def check_picklable(structure: nn.Module) -> None:
    """Refuse the structure of a model that pickle cannot write.

    Nothing is refused while a pickler of another library runs (cloudpickle, dill): these can write more.

    Args:
        structure: the model without its numbers.

    Raises:
        ModelError: an attribute cannot be pickled, or a class cannot be imported.
    """
    reach = Reach(structure)
    for key in reach.aliases:
        raise ModelError(
            "is a tensor in the memory of a weight, which it would no longer be after pickling",
            where=reach.places[key],
            remedy=_REMEDY,
        )
    error = _failure(structure)
    if error is None or _is_other_pickler():
        return
    where = type(structure).__name__
    for name, module in structure.named_modules():
        for attribute, value in vars(module).items():
            found = _failure(value) if attribute not in _REGISTRIES else None
            if found is not None:
                what, where, error = "cannot be pickled", f"{name}.{attribute}".removeprefix("."), found
                break
        else:
            continue
        break
    else:
        what = "has a class or a part that cannot be pickled"
    raise ModelError(
        f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
        where=where,
        remedy=_REMEDY,
    ) from error


def _failure(value: object) -> Exception | None:
    try:
        pickle.dumps(value)
    except Exception as error:  # noqa: BLE001  # whatever a class raises that is not made to be pickled
        return error
    return None


def _is_other_pickler() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, (pickle.Pickler, pickle._Pickler)) and type(running).__module__ not in (
            "pickle",
            "_pickle",
        ):
            return True
        frame = frame.f_back
    return False
