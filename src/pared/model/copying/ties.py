"""Whether a copy of a model still leads to the model: what its modules refer to, and what their forward looks up."""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any, Final

from torch import Tensor, nn

from pared.errors import ModelError
from pared.model.copying.reach import (
    PROXIES,
    Reach,
    contents,
    is_plain,
    memory_of,
    reachable,
    references,
    weak_targets,
)
from pared.model.tensors import registered

_REMEDY: Final = (
    "pared works on copies of the model, and what is changed in a copy would have no effect. Undo it before, or put it "
    "into a subclass of the model's class, in methods that use only `self`."
)
_TORCH: Final = ("torch.", "pared.")


class _Original:
    """What a copy must not lead to: modules and registered tensors, except tensors that it has on purpose."""

    def __init__(self, reach: Reach[nn.Module], kept: Mapping[int, Tensor]) -> None:
        self.ids: set[int] = {id(module) for module in reach.modules} | (reach.registered.keys() - kept.keys())
        self._tensors = reach.registered, kept

    @functools.cached_property
    def memory(self) -> set[int]:
        """The memory of the model's tensors that no tensor of the copy has on purpose."""
        held, shared = (
            {memory_of(tensor) for tensor in tensors.values() if is_plain(tensor)} for tensors in self._tensors
        )
        return held - shared

    def has(self, value: object) -> bool:
        if id(value) in self.ids:
            return True
        return isinstance(value, Tensor) and is_plain(value) and memory_of(value) in self.memory


def check_copy(reach: Reach[nn.Module], clone: nn.Module) -> None:
    """Refuse a copy that refers to the model: whatever its modules would compute, it would not be with their weights.

    Args:
        reach: what the model refers to.
        clone: the copy.

    Raises:
        ModelError: an attribute of a module leads to a module or a weight of the model, not of the copy.
    """
    kept = {id(tensor): tensor for module in clone.modules() for _, tensor in registered(module)}
    original, copied = _Original(reach, kept), reachable(clone)
    back = original.ids & copied.keys()
    leading = {kind for kind in set(map(type, copied.values())) if issubclass(kind, (Tensor, weakref.ref, *PROXIES))}
    back |= {key for key, one in copied.items() if type(one) in leading and key not in kept and _leads(original, one)}
    if back:
        places = Reach(clone).places
        place = next((place for key, place in places.items() if key in back), "")
        raise _tied(place, "leads back to the model that was copied, not to the copy")
    for name, function in _own_functions(clone):
        for cell in function.__closure__ or ():
            if any(original.has(one) for content in contents(cell) for one in _near(content)):
                raise _tied(name, "is a method of the class that has the model itself in its closure")


def _leads(original: _Original, value: object) -> bool:
    """Whether a tensor is in the memory of a weight of the model, or a weak reference refers to the model."""
    if isinstance(value, Tensor):
        return original.has(value)
    return any(id(to) in original.ids for to in weak_targets(value))


def check_globals(model: nn.Module) -> None:
    """Refuse a model whose forward looks modules of it up in global variables: that of a copy would find the same ones.

    Only names in the code of functions on the model's modules, and of the `forward` of their classes, are looked at.

    Raises:
        ModelError: there is such a function.
    """
    reach = Reach(model)
    original = _Original(reach, {})
    functions = [(reach.places[key], one) for key, one in reach.objects.items() if isinstance(one, FunctionType)]
    functions += [(name, one) for name, one in _own_functions(model) if name.endswith("forward")]
    for name, function in functions:
        for used in _names(function.__code__):
            if used in function.__globals__ and any(map(original.has, _near(function.__globals__[used]))):
                raise _tied(
                    name, f"uses the global variable {used}, which leads to the model itself, not to its copies"
                )


def _tied(where: str, what: str) -> ModelError:
    return ModelError(what, where=where, remedy=_REMEDY)


_CONSTRUCTORS: Final = ("__init__", "__new__")


def _own_functions(model: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """The functions in the classes of a model's modules but constructors, except torch's, by the name of a module."""
    known: set[type] = set()
    first: dict[type, str] = {}
    for name, module in model.named_modules():
        first.setdefault(type(module), name)
    for kind, name in first.items():
        for cls in kind.__mro__:
            if cls in known or cls is object or f"{cls.__module__}.".startswith(_TORCH):
                continue
            known.add(cls)
            for attribute, member in vars(cls).items():
                if attribute in _CONSTRUCTORS:
                    continue  # nothing that copies do
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                while isinstance(function, FunctionType):
                    yield f"{name}.{attribute}".removeprefix("."), function
                    function = getattr(function, "__wrapped__", None)


_GLOBAL: Final = ("LOAD_GLOBAL", "LOAD_NAME")


def _names(code: CodeType) -> set[str]:
    """The names of globals in the code of a function, and of the functions in it; not those of attributes."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname in _GLOBAL}
    for constant in code.co_consts:
        found |= _names(constant) if isinstance(constant, CodeType) else set()
    return found


_CONTAINERS: Final = (dict, list, tuple, set, FunctionType, MethodType)
_DEPTH: Final = 3


def _near(value: Any, depth: int = _DEPTH) -> Iterator[object]:
    """An object, and what containers, methods and closures that are not nested deeply hold."""
    yield value
    yield from weak_targets(value)
    inner = isinstance(value, _CONTAINERS) or callable(getattr(value, "func", None))  # a partial
    if depth and inner and not isinstance(value, nn.Module):
        for one in references(value):
            cell = contents(one) if type(one).__name__ == "cell" else (one,)  # type: ignore[arg-type]  # it is one
            for content in cell:
                yield from _near(content, depth - 1)
