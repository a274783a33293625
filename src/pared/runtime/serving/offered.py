"""Names that a quantized model has in addition to those of its class, and that give way to the class's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any, Final

from torch import Tensor, nn

from pared.runtime.serving.served import Served


def free_names(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Those of the names that the model has no use for, so that they can be offered.

    A model has a use for an attribute that it has, and for one that its code asks for before it is set, as in
    `if not hasattr(self, "plan"): self.plan = ...`. As `torch.save` is not an attribute of the model, code that merely
    calls something of that name does not count for the names of methods.
    """
    cls = type(model)
    texts, attributes = _mentioned(cls)
    used = texts | {name for name in attributes if name not in _METHODS}
    # The class is asked first: a property of its own is not computed, which may fail before the first call.
    return frozenset(name for name in names if name not in used and not hasattr(cls, name) and not hasattr(model, name))


_METHODS: Final = frozenset(("save", "export", "report", "pared"))
_ASKING: Final = frozenset(("hasattr", "getattr"))


def _mentioned(cls: type[nn.Module]) -> tuple[set[str], set[str]]:
    """What the code of a class, and of its bases below nn.Module, may ask a model for.

    Returns:
        the texts in functions that call `hasattr` or `getattr`, and the names of all globals and attributes.
    """
    codes: list[CodeType] = []
    for base in cls.__mro__:
        members = vars(base).values() if base not in nn.Module.__mro__ else ()
        for member in members:
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            codes += [code] if isinstance(code, CodeType) else []
    texts: set[str] = set()
    attributes: set[str] = set()
    while codes:
        code = codes.pop()
        attributes |= set(code.co_names)
        if not _ASKING.isdisjoint(code.co_names):
            texts |= {constant for constant in code.co_consts if isinstance(constant, str)}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return texts, attributes


_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")


class Offered:
    """A name that a quantized model offers as long as the model has none of its own.

    Only `__get__` is defined: what the model's `forward` assigns to the name is stored as in any module, and is what
    the name gives from then on.

    Args:
        function: a function of the model; the name gives its result, or the function bound to the model.
        is_method: whether the name gives the bound function.
    """

    def __init__(self, function: Callable[..., Any], *, is_method: bool = False) -> None:
        self.function = function
        self.is_method = is_method
        self.__doc__ = function.__doc__
        self._name = ""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: nn.Module | None, _owner: type | None = None) -> Any:
        """The value. AttributeError where the model has a tensor or module of that name: then torch looks it up."""
        if model is None:
            return self.function
        if any(self._name in model.__dict__.get(registry, ()) for registry in _REGISTRIES):
            raise AttributeError(self._name)
        return MethodType(self.function, model) if self.is_method else self.function(model)


class Yielding(Served):
    """Lets a model register tensors and modules under the names that it offers; torch refuses names it already has."""

    pared_is_whole = True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module."""
        with _given_up(self, "_parameters", name):
            super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in every module."""
        with _given_up(self, "_buffers", name):
            super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in every module."""
        with _given_up(self, "_modules", name):
            super().add_module(name, module)


@contextmanager
def _given_up(model: nn.Module, registry: str, name: str) -> Iterator[None]:
    """Enter an offered name in a registry, so that torch takes what follows for a second registration of it."""
    is_taken = any(name in model.__dict__[known] for known in _REGISTRIES) or name in model.__dict__
    if is_taken or not isinstance(vars(type(model)).get(name), Offered):
        yield
        return
    model.__dict__[registry][name] = None
    try:
        yield
    except BaseException:
        del model.__dict__[registry][name]
        raise
