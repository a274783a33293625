"""Which modules can run on codes, and how: a table by type, to which users can add their own layers."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from pared.formats.views import OWN_ROWS
from pared.runtime.kernels.machine import available
from pared.runtime.layers.subclasses import class_below


@dataclass(frozen=True)
class Layer:
    """How modules of a type run on codes.

    Args:
        weights: gives a module's attributes that stay in codes; none if this module cannot run on codes.
        modes: how the input may be treated, see `Activation`.
        forward: runs instead of the module's own, as `forward(module, *args, **kwargs)`; it may return `NotImplemented`
            to let the float forward run. None: the module's own forward runs, and int8 kernels replace `F.linear`,
            convolutions and table lookups of its weights.
        reason: gives why its kernels cannot run on this machine, beyond what holds for all; empty if they can.
        children: the names of children whose `weight` the forward uses without calling them.
        columns: each value along the last dimension of the input is multiplied by one column of the weight only, so a
            static range may exclude columns (`kernels.outliers`).
    """

    weights: Callable[[Any], tuple[str, ...]]
    modes: tuple[str, ...]
    forward: Callable[..., Any] | None = None
    reason: Callable[[], str] = str
    children: tuple[str, ...] = ()
    columns: bool = False

    def missing(self) -> str:
        """Why its kernels cannot run here, in words; empty if they can, or if it only looks up rows."""
        return "" if self.modes == ("gather",) else available() or self.reason()


# By type; a module has the entry of the nearest class among its bases. A class that nothing else uses is forgotten.
LAYERS: Final[weakref.WeakKeyDictionary[type[nn.Module], Layer]] = weakref.WeakKeyDictionary()


def _listed_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    return next((base for base in cls.__mro__ if base in LAYERS), None)


def layer_of(module: nn.Module) -> Layer | None:
    """The entry of a module's class; None if the module cannot run on codes."""
    cls = class_below(type(module))
    home = _listed_class(cls)
    if home is None:
        return None
    layer = LAYERS[home]
    # The table's forward cannot replace that of a subclass with a forward of its own.
    return layer if layer.forward is None or cls.forward is home.forward else None


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """The attributes that can stay in codes while the module runs; none if it has no counterpart."""
    layer = layer_of(module)
    if layer is None or hasattr(module, "parametrizations"):
        return ()
    found = layer.weights(module)
    if layer.forward is not None and _own_rows(class_below(type(module)), found):
        return ()
    return found if all(module._parameters.get(attribute) is not None for attribute in found) else ()


def has_columns(module: nn.Module) -> bool:
    """Whether a range may exclude single columns of the module's input."""
    cls = class_below(type(module))
    home = _listed_class(cls)
    # A subclass with a forward of its own may multiply something other than its input.
    return home is not None and LAYERS[home].columns and cls.forward is home.forward


def _own_rows(cls: type[nn.Module], attributes: tuple[str, ...]) -> bool:
    """Whether a subclass of a listed class was registered with another layout of its weights."""
    nearer = itertools.takewhile(lambda base: base not in LAYERS, cls.__mro__)
    return any(attribute in OWN_ROWS.get(base, {}) for base in nearer for attribute in attributes)
