"""Subclasses of a user's own class, made while the program runs, and the way back to the class itself.

A module gets new behaviour by changing its class in place: to a subclass of its own class, with a mixin in front, so
that `isinstance`, attributes, hooks and the module's own `forward` stay. Mixins may lie on top of each other:
`Counterpart` (weights are codes), `Served` (something faster answers its calls), `Quantized` (a whole model).

Such a class cannot be imported, so modules are pickled under the class below it. It is kept only as long as it is used:
a notebook that defines its class again leaks neither.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final, TypeVar, cast

from torch import nn

MixinT = TypeVar("MixinT", bound=nn.Module)


class Mixin(nn.Module):
    """Base of everything that is mixed in before the class of a user's module."""


# By the identity of the user's class, which is not used again before the subclass, which refers to it, is gone.
_KNOWN: Final[weakref.WeakValueDictionary[Hashable, type[nn.Module]]] = weakref.WeakValueDictionary()
_LOCK: Final = threading.Lock()


def subclass_of(
    base: type[nn.Module],
    mixin: type[MixinT],
    variant: Hashable = None,
    members: Callable[[], Mapping[str, Any]] = dict,
) -> type[MixinT]:
    """The subclass of a user's class that has a mixin in front; it has the name of the user's class.

    Args:
        base: the class of the user's module.
        mixin: comes first in the order of method resolution.
        variant: tells subclasses of the same two classes apart.
        members: gives the attributes of the subclass; called when it is made.
    """
    key = (id(base), mixin, variant)
    with _LOCK:
        found = _KNOWN.get(key)
        if found is None:
            names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
            found = _KNOWN[key] = type(base.__name__, (mixin, base), {**names, **members()})
    return cast(type[MixinT], found)


def class_below(cls: type[nn.Module], mixin: type[nn.Module] = Mixin) -> type[nn.Module]:
    """The class that a module had before a mixin was put in front of it, with whatever came on top of the mixin.

    Args:
        cls: the class of a module, which is given back if the mixin is not in it.
        mixin: default: any; then this is the user's own class.
    """

    def is_of_mixin(base: type) -> bool:
        """Whether it is the mixin, a class made with it, or a mixin that it is made of."""
        return issubclass(base, mixin) or (issubclass(base, Mixin) and issubclass(mixin, base))

    found: Any = next(base for base in cls.__mro__ if not is_of_mixin(base))
    return cast(type[nn.Module], found)
