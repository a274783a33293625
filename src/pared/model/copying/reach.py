"""Every object that can be reached from a model's attributes, and where it was met first."""

from __future__ import annotations

import bisect
import functools
import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, Generic

import torch
from torch import Tensor, nn

from pared.model.tensors import ModuleT_co, registrations

PLAIN: Final = (int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented), range, slice)
SHARED: Final = (ModuleType, logging.Logger)  # copies share these, and nobody looks into them
PROXIES: Final = (weakref.ProxyType, weakref.CallableProxyType)
_CONTAINERS: Final = (dict, OrderedDict, list, tuple, set)  # most objects are
_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")
_DROPPED: Final = ("_pared_packed", "_compiled_call_impl")  # what no copy takes with it


class Reach(Generic[ModuleT_co]):
    """The objects that a model refers to: through attributes, containers, closures, methods, hooks and defaults.

    Args:
        model: what it refers to is looked at only.

    Attributes:
        objects: every object by its `id`, except plain values and classes.
        places: by the `id` of an object, the module and the attribute where it was met first: "encoder.forward".
    """

    def __init__(self, model: ModuleT_co) -> None:
        self.model = model
        self.modules: Final = list(model.modules())
        self.objects: dict[int, object] = {}
        self.places: dict[int, str] = {}
        self.registered: Final = {id(tensor): tensor for m in self.modules for _, tensor, _, _ in registrations(m)}
        self.holders: dict[int, list[int]] = {}  # by object, those that refer to it
        self._leaves: dict[type, bool] = {}  # by class, whether nothing is behind its objects
        self.registries: Final = {id(vars(m).get(name)) for m in self.modules for name in _REGISTRIES}
        for name, module in model.named_modules():
            self.objects[id(module)], self.places[id(module)], self.holders[id(module)] = module, name, []
        for name, module in model.named_modules():
            for attribute, value in attributes(module):
                if attribute not in _DROPPED and (type(value) is not OrderedDict or value):  # most hooks are none
                    self._add(value, id(module), f"{name}.{attribute}".removeprefix("."))
        self._weak()

    def _add(self, start: object, holder: int, place: str) -> None:
        objects, places, holders, leaves = self.objects, self.places, self.holders, self._leaves
        waiting = [(start, holder)]
        while waiting:
            value, owner = waiting.pop()
            kind = type(value)
            is_leaf = leaves.get(kind)
            if is_leaf is None:
                is_leaf = leaves[kind] = issubclass(kind, (*PLAIN, type, CodeType))
            if is_leaf:
                continue
            key = id(value)
            if key in objects:
                holders[key].append(owner)
                continue
            objects[key], places[key], holders[key] = value, place, [owner]
            waiting += [(child, key) for child in references(value)]

    def _weak(self) -> None:
        """Weak references count where they refer to what is met anyway."""
        for key, value in list(self.objects.items()):
            for target in weak_targets(value):
                if id(target) in self.objects:
                    self.holders.setdefault(id(target), []).append(key)

    @functools.cached_property
    def aliases(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Tensors and arrays in the memory of a registered tensor that are not registered: each with that tensor."""
        memory: dict[int, list[Tensor]] = {}
        for tensor in self.registered.values():
            if _has_memory(tensor):
                memory.setdefault(memory_of(tensor), []).append(tensor)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for key, value in self.objects.items():
            if isinstance(value, Tensor) and key not in self.registered and _has_memory(value):
                owners = memory.get(memory_of(value), [])
                if owners:
                    found[key] = (value, next((one for one in owners if _lies_within(value, one)), owners[0]))
        return found

    def is_in_memory(self, start: int, end: int) -> bool:
        """Whether bytes between two addresses are in the memory of a registered tensor."""
        place = bisect.bisect_left(self._memory, (end, 0)) - 1  # the last that begins before the end
        return place >= 0 and self._memory[place][1] > start

    @functools.cached_property
    def _memory(self) -> list[tuple[int, int]]:
        """The addresses of registered tensors on the CPU: where each stretch of memory begins and ends, in order."""
        storages = [one.untyped_storage() for one in self.registered.values() if is_plain(one) and one.is_cpu]
        found: list[tuple[int, int]] = []
        for start, end in sorted({(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages}):
            if found and start < found[-1][1]:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            else:
                found.append((start, end))
        return found

    @functools.cached_property
    def tied(self) -> set[int]:
        """The objects through which the model's modules, or any tensors, can be reached, by `id`."""
        found = {id(module) for module in self.modules}
        found |= {key for key, value in self.objects.items() if isinstance(value, Tensor)}
        waiting = list(found)
        while waiting:
            for holder in self.holders.get(waiting.pop(), ()):
                if holder not in found:
                    found.add(holder)
                    waiting.append(holder)
        return found

    def held_elsewhere(self) -> set[int]:
        """The `id` of every registered tensor that can be read without its module: from a list, a closure, an alias."""
        ours = {id(vars(m).get("_flat_weights")) for m in self.modules}  # an LSTM's, which copying renews
        left_out = self.registries | ours | {id(one) for one in self.objects.values() if _is_bookkeeping(one)}
        found = {id(owner) for _, owner in self.aliases.values()}
        return found | {key for key in self.registered if not left_out.issuperset(self.holders[key])}


def _is_bookkeeping(value: object) -> bool:
    """What holds parameters but computes no output: an optimizer's groups, and weak references to an LSTM's weights."""
    return isinstance(value, weakref.ref) or (isinstance(value, dict) and {"params", "lr"} <= value.keys())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers in memory that can be compared with that of another one."""
    return _has_memory(tensor) and not tensor.is_meta


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    return plain and tensor.numel() > 0


def memory_of(tensor: Tensor) -> int:
    """What tells one memory from another, on the meta device as well."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def _lies_within(inner: Tensor, outer: Tensor) -> bool:
    return inner.dtype == outer.dtype and _first(outer) <= _first(inner) and _last(inner) <= _last(outer)


def _first(tensor: Tensor) -> int:
    return int(tensor.storage_offset())


def _last(tensor: Tensor) -> int:
    return _first(tensor) + span(tensor)


def span(tensor: Tensor) -> int:
    """How many numbers after its first one the last one of a tensor is in memory."""
    return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def slots(kind: type) -> tuple[str, ...]:
    """The attributes of a class that its objects have no dict for."""
    found = []
    for cls in kind.__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{cls.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def attributes(value: Any) -> Iterator[tuple[str, object]]:
    """What a module has as attributes, in its dict and in slots."""
    yield from vars(value).items()
    for name in slots(type(value)):
        if hasattr(value, name):
            yield name, getattr(value, name)


def references(value: Any) -> Iterable[object]:
    """What an object refers to, as far as a copy of it would have to refer to something else."""
    if type(value) in _CONTAINERS:
        return gc.get_referents(value)
    if isinstance(value, nn.Module):
        return [one for attribute, one in attributes(value) if attribute not in _DROPPED]
    if isinstance(value, Tensor):
        return list(getattr(value, "__dict__", {}).values())
    if isinstance(value, FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (*(value.__closure__ or ()), *defaults, *vars(value).values())
    if isinstance(value, CellType):
        return contents(value)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, BuiltinFunctionType):
        return (value.__self__,)
    if isinstance(value, GeneratorType):
        return list(value.gi_frame.f_locals.values()) if value.gi_frame is not None else ()
    if isinstance(value, (FrameType, *SHARED, *PROXIES)):
        return ()
    return gc.get_referents(value)


def contents(cell: CellType) -> tuple[object, ...]:
    """What is in a cell of a closure: nothing, or one object."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def weak_targets(value: Any) -> Iterator[object]:
    """What an object refers to without keeping it alive."""
    if isinstance(value, PROXIES):
        target = behind(value)
    elif isinstance(value, weakref.ref):
        target = value()
    else:
        return
    if target is not None:
        yield target.__self__ if isinstance(target, MethodType) else target


def behind(proxy: Any) -> object:
    """What a weak proxy stands for; None if it is gone."""
    try:
        return proxy.__dir__.__self__  # a method that every object has, bound to the object itself
    except ReferenceError:
        return None
