"""Every object that can be reached from a model's attributes, and where it was met first."""

from __future__ import annotations

import bisect
import functools
import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, Generic

import torch
from torch import Tensor, nn

from pared.formats.coded import Float, Grid, Grouped, Raw
from pared.formats.views import View
from pared.model.contents import Decision
from pared.model.tensors import ModuleT_co, registrations

PLAIN: Final = (int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented), range, slice)
# Copies share these, and nobody looks into them; what a quantized model knows of each tensor never changes.
SHARED: Final = (ModuleType, logging.Logger, Decision, View, Grid, Grouped, Float, Raw)
PROXIES: Final = (weakref.ProxyType, weakref.CallableProxyType)
_CONTAINERS: Final = frozenset((dict, OrderedDict, list, tuple, set))  # most objects are
PLAIN_KINDS: Final = frozenset(PLAIN)
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
        named = list(model.named_modules())
        self.modules: Final = [module for _, module in named]
        self.objects: dict[int, object] = {}
        self.places: dict[int, str] = {}
        self.registered: Final = {id(tensor): tensor for m in self.modules for _, tensor, _, _ in registrations(m)}
        self.holders: dict[int, list[int]] = {}  # by object, those that refer to it
        self._ways: dict[type, Way | None] = {}  # by class, see `_way_from`
        self.registries: Final = {id(vars(m).get(name)) for m in self.modules for name in _REGISTRIES}
        for name, module in named:
            self.objects[id(module)], self.places[id(module)], self.holders[id(module)] = module, name, []
        for name, module in named:
            for attribute, value in attributes(module):
                kind = type(value)
                # Most attributes of a module are numbers and hooks, of which there are none.
                if kind not in PLAIN_KINDS and (kind not in _CONTAINERS or value) and attribute not in _DROPPED:
                    self._add(value, id(module), f"{name}.{attribute}".removeprefix("."))
        self._weak()

    def _add(self, start: object, holder: int, place: str) -> None:
        objects, places, holders, ways = self.objects, self.places, self.holders, self._ways
        waiting = [(start, holder)]
        while waiting:
            value, owner = waiting.pop()
            key = id(value)
            if key in objects:
                holders[key].append(owner)
                continue
            kind = type(value)
            if kind not in ways:
                ways[kind] = _way_from(kind)
            way = ways[kind]
            if way is None:
                continue
            objects[key], places[key], holders[key] = value, place, [owner]
            waiting += [(child, key) for child in way(value) if type(child) not in PLAIN_KINDS]

    def _weak(self) -> None:
        """Weak references count where they refer to what is met anyway."""
        for key, value in self.weak.items():
            for target in weak_targets(value):
                if id(target) in self.objects:
                    self.holders.setdefault(id(target), []).append(key)

    @functools.cached_property
    def weak(self) -> dict[int, object]:
        """The weak references and weak proxies among the objects."""
        return self._of_class((weakref.ref, *PROXIES))

    @functools.cached_property
    def tensors(self) -> dict[int, Tensor]:
        """The tensors among the objects, registered or not."""
        return self._of_class((Tensor,))

    def _of_class(self, wanted: tuple[type, ...]) -> dict[int, Any]:
        kinds = {kind for kind in self._ways if issubclass(kind, wanted)}
        return {key: value for key, value in self.objects.items() if type(value) in kinds}

    @functools.cached_property
    def aliases(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Tensors and arrays in the memory of a registered tensor that are not registered: each with that tensor."""
        memory: dict[int, list[Tensor]] = {}
        for tensor in self.registered.values():
            if _has_memory(tensor):
                memory.setdefault(memory_of(tensor), []).append(tensor)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for key, value in self.tensors.items():
            if key not in self.registered and _has_memory(value):
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
        found |= self.tensors.keys()
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


def reachable(model: nn.Module) -> dict[int, Any]:
    """The same objects by their `id`, except empty containers; found faster, as nothing else is noted of them."""
    found: dict[int, Any] = {}
    ways: dict[type, Way | None] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        key, kind = id(value), type(value)
        if key in found:
            continue
        if kind not in ways:
            ways[kind] = _way_from(kind)
        way = ways[kind]
        if way is None:
            continue
        found[key] = value
        for child in way(value):
            kind = type(child)
            if kind not in PLAIN_KINDS and (kind not in _CONTAINERS or child):
                waiting.append(child)
    return found


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


def slots(kind: type) -> Mapping[str, MemberDescriptorType]:
    """The attributes of a class that its objects have no dict for, each with what reads it."""
    known = _SLOTS.get(kind)
    if known is None:
        known = _SLOTS[kind] = _slots(kind)
    return known


_SLOTS: Final[weakref.WeakKeyDictionary[type, Mapping[str, MemberDescriptorType]]] = weakref.WeakKeyDictionary()


def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    found: dict[str, MemberDescriptorType] = {}
    for cls in kind.__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            is_private = name.startswith("__") and not name.endswith("__")
            attribute = f"_{cls.__name__.lstrip('_')}{name}" if is_private else name
            member = vars(cls).get(attribute)
            if isinstance(member, MemberDescriptorType):  # neither __dict__ nor __weakref__
                found.setdefault(attribute, member)
    return found


def slotted(value: object) -> Iterator[tuple[str, object]]:
    """What an object has in slots, past whatever its class makes of reading attributes."""
    for name, member in slots(type(value)).items():
        try:
            yield name, member.__get__(value)
        except AttributeError:  # noqa: PERF203  # any of them may be unset
            continue


def attributes(value: Any) -> Iterator[tuple[str, object]]:
    """What a module has as attributes, in its dict and in slots."""
    yield from vars(value).items()
    yield from slotted(value)


Way = Callable[[Any], Iterable[object]]


def references(value: Any) -> Iterable[object]:
    """What an object refers to, as far as a copy of it would have to refer to something else."""
    way = _way_from(type(value))
    return () if way is None else way(value)


def _way_from(kind: type) -> Way | None:
    """How to find what objects of a class refer to; None for plain values and classes, behind which nothing is."""
    if kind in _CONTAINERS:
        return gc.get_referents
    if issubclass(kind, (*PLAIN, type, CodeType)):
        return None
    return next((way for kinds, way in _WAYS if issubclass(kind, kinds)), gc.get_referents)


def _of_module(value: nn.Module) -> Iterable[object]:
    return [one for attribute, one in attributes(value) if attribute not in _DROPPED]


def _of_tensor(value: Tensor) -> Iterable[object]:
    return list(getattr(value, "__dict__", {}).values())


def _of_function(value: FunctionType) -> Iterable[object]:
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return (*(value.__closure__ or ()), *defaults, *vars(value).values())


def _of_generator(value: GeneratorType[Any, Any, Any]) -> Iterable[object]:
    return list(value.gi_frame.f_locals.values()) if value.gi_frame is not None else ()


def contents(cell: CellType) -> tuple[object, ...]:
    """What is in a cell of a closure: nothing, or one object."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


# By class, in this order.
_WAYS: Final[tuple[tuple[tuple[type, ...], Way], ...]] = (
    ((nn.Module,), _of_module),
    ((Tensor,), _of_tensor),
    ((FunctionType,), _of_function),
    ((CellType,), contents),
    ((MethodType,), lambda value: (value.__self__, value.__func__)),
    ((BuiltinFunctionType,), lambda value: (value.__self__,)),
    ((GeneratorType,), _of_generator),
    ((FrameType, *SHARED, *PROXIES), lambda _: ()),
)


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
