"""How each kind of object in a model is copied, so that nothing in the copy refers to the model.

`copy.deepcopy` does most of it. It looks every object up in its memo first, and this memo makes what deepcopy would
share (functions with what they close over, weak references) or refuse (locks, tensors with a graph).
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from concurrent.futures import Executor
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from pared.errors import ModelError, ParedError
from pared.model.copying.reach import PLAIN_KINDS, PROXIES, SHARED, Reach, behind, contents, slotted, span, weak_targets

log = logging.getLogger(__name__)

_UNMADE: Final = object()
_LOCKS: Final[Mapping[type, Callable[[], object]]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}
_RUNNING: Final = (Generator, AsyncGenerator, Coroutine)
_MUTABLE: Final = (list, dict, set, bytearray, tuple)  # what a closure keeps its state in
_COMPILED: Final = "_torchdynamo_orig_callable"  # the attribute of what torch.compile and torch.compiler return


class Memo(dict[int, Any]):
    """The memo of a deep copy of a model.

    Args:
        reach: what the model refers to.
        tensors: by the `id` of a registered tensor, the one that takes its place.
        into: an object of the model's class that becomes the copy; None: a new one does.
    """

    def __init__(self, reach: Reach[nn.Module], tensors: Mapping[int, Tensor], into: nn.Module | None = None) -> None:
        super().__init__(tensors)
        self._reach = reach
        self._into = into
        self._making: set[int] = set()
        self._kinds: dict[type, Callable[[Memo, Any], object] | None] = {}

    def get(self, key: int, default: Any = None) -> Any:
        """The copy of an object, by its `id`; made now if it is of a kind that deepcopy does not copy as it should."""
        found = super().get(key, _UNMADE)
        if found is not _UNMADE:
            return found
        value = self._reach.objects.get(key, _UNMADE)
        if value is _UNMADE or key in self._making:
            return default
        rule = self.rule(type(value))
        if rule is None:
            return default
        self._making.add(key)
        try:
            made = self[key] = rule(self, value)
        finally:
            self._making.discard(key)
        return made

    def rule(self, kind: type) -> Callable[[Memo, Any], object] | None:
        """How objects of a class are copied; None: as `copy.deepcopy` does it."""
        if kind not in self._kinds:
            self._kinds[kind] = _rule(kind)
        return self._kinds[kind]

    def copied(self, value: Any) -> Any:
        """A deep copy of anything that the model refers to."""
        kind = type(value)
        if kind in PLAIN_KINDS:
            return value
        made = super().get(id(value), _UNMADE)
        if made is not _UNMADE:
            return made
        # Most of what modules hold: `copy.deepcopy`, which does the same, takes much longer for it.
        if kind in _EMPTY and not value:
            return self.setdefault(id(value), kind())
        if kind is dict:
            new = self[id(value)] = {}
            self.setdefault(id(self), []).append(value)  # which keeps it alive, and its `id` its own
            for key, one in value.items():
                new[self.copied(key)] = self.copied(one)
            return new
        return copy.deepcopy(value, self)

    def blank(self, module: nn.Module) -> nn.Module:
        """The object that becomes the copy of a module."""
        if module is self._reach.model and self._into is not None:
            vars(self._into).clear()
            return self._into
        return object.__new__(type(module))

    def is_tied(self, value: object) -> bool:
        """Whether the model's modules, or any tensors, can be reached through an object."""
        return id(value) in self._reach.tied

    def place(self, value: object) -> str:
        """The module and the attribute where an object was met first."""
        return self._reach.places.get(id(value)) or type(self._reach.model).__name__

    def enclosed(self, value: Any) -> Any:
        """The copy of what a function closes over, or has as a default: of anything but its state it is the same."""
        return self.copied(value) if self.is_tied(value) or isinstance(value, _MUTABLE) else value


def _copied_or_shared(memo: Memo, value: Any) -> object:
    """A copy; the same object if it cannot be copied and leads to no tensor (a handle, a connection, a stream)."""
    try:
        return memo.copied(value)
    except (ParedError, RecursionError, MemoryError):
        raise
    except Exception as error:  # whatever a class raises that is not made to be copied
        if isinstance(value, (nn.Module, Tensor)) or memo.is_tied(value):
            raise _uncopyable(memo, value, f"{type(error).__name__}: {error}") from error
        log.debug("%s: a %s is shared with the copy (%s)", memo.place(value), type(value).__name__, error)
        return value


def _module(memo: Memo, value: nn.Module) -> object:
    """A module, with all modules below it, one after the other: they may nest deeper than Python calls itself."""
    made: list[tuple[nn.Module, nn.Module]] = []
    waiting: list[Any] = [value]
    while waiting:
        old: nn.Module = waiting.pop()
        if id(old) not in memo and memo.rule(type(old)) is _module:
            new = memo[id(old)] = memo.blank(old)
            memo[id(vars(old))] = vars(new)
            made.append((old, new))
            waiting += vars(old).get("_modules", {}).values()
    for old, new in reversed(made):  # what a module holds is whole before the module is
        vars(new).update({name: memo.copied(one) for name, one in vars(old).items()})
        for name, content in slotted(old):  # which torch would leave out
            setattr(new, name, memo.copied(content))
    return memo[id(value)]


def _uncopyable(memo: Memo, value: object, why: str) -> ModelError:
    what = f"is or holds a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")
    return ModelError(
        f"{what}, which cannot be copied ({' '.join(why.split())[:200]})",
        where=memo.place(value),
        remedy="pared works on copies of the model. Set the attribute to None before, or give the object's class a "
        "__deepcopy__ method.",
    )


def _share(_memo: Memo, value: object) -> object:
    return value


def _refuse(memo: Memo, value: object) -> object:
    raise _uncopyable(memo, value, "what it has still to give would be taken from the model")


def _partial(memo: Memo, value: functools.partial[Any]) -> object:
    new = memo[id(value)] = functools.partial(memo.copied(value.func))  # before what may refer to it
    arguments, named = memo.copied(value.args), memo.copied(value.keywords)
    new.__setstate__((new.func, arguments, named, memo.copied(vars(value)) or None))  # type: ignore[attr-defined]  # typeshed lacks it
    return new


def _new_lock(_memo: Memo, value: object) -> object:
    return _LOCKS[type(value)]()


def _local(memo: Memo, value: Any) -> object:
    new = type(value)()
    new.__dict__.update(memo.copied(value.__dict__))
    return new


def _tensor(memo: Memo, value: Tensor) -> object:
    """A tensor that is not registered: an alias of a registered one stays that; what has a graph loses it."""
    alias = memo._reach.aliases.get(id(value))
    if alias is not None:
        return _aliasing(memo, *alias)
    if value.grad_fn is not None:
        return value.detach().clone()
    return _copied_or_shared(memo, value)


def _aliasing(memo: Memo, value: Tensor, owner: Tensor) -> Tensor:
    """The same part of the tensor that takes the owner's place."""
    new = memo[id(owner)].detach()
    offset = value.storage_offset() - owner.storage_offset()
    fits = offset >= 0 and offset + span(value) <= span(owner) and value.dtype == owner.dtype
    if not fits or new.stride() != owner.stride():
        raise ModelError(
            "is a tensor in the same memory as a weight, of another type or with other weights around it",
            where=memo.place(value),
            remedy="Register it, or set the attribute to None before: in a copy it could not follow the weight.",
        )
    part = new.as_strided(value.shape, value.stride(), new.storage_offset() + offset)
    return nn.Parameter(part, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else part


def _addresses(value: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Where the numbers of an array begin and end, whatever its strides."""
    first = value.__array_interface__["data"][0]
    ways = [(size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True)]
    return first + sum(way for way in ways if way < 0), first + sum(way for way in ways if way > 0) + value.itemsize


def _array(memo: Memo, value: np.ndarray[Any, Any]) -> object:
    if value.size and memo._reach.is_in_memory(*_addresses(value)):
        raise ModelError(
            "is an array in the memory of a weight, which a copy of the model would go on reading",
            where=memo.place(value),
            remedy="Use the tensor itself, or set the attribute to None before.",
        )
    return _copied_or_shared(memo, value)


def _function(memo: Memo, value: Any) -> object:
    """A function whose closure, defaults and attributes lead to the copy's modules and tensors, not to the model's."""
    if not memo.is_tied(value):
        return value
    if hasattr(value, _COMPILED):  # compiled for the model; the copy runs what was compiled
        inner = getattr(value, _COMPILED)
        of_torch = f"torch{os.sep}_dynamo{os.sep}" in getattr(getattr(inner, "__code__", None), "co_filename", "")
        return memo.copied(getattr(inner, "__wrapped__", inner) if of_torch else inner)
    cells = tuple(memo.copied(cell) for cell in value.__closure__ or ())
    new = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = new  # before what may refer to it
    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        for content in contents(old) if not contents(cell) else ():
            cell.cell_contents = memo.enclosed(content)
    new.__defaults__ = value.__defaults__ and tuple(map(memo.enclosed, value.__defaults__))
    new.__kwdefaults__ = value.__kwdefaults__ and {k: memo.enclosed(v) for k, v in value.__kwdefaults__.items()}
    new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
    new.__annotations__ = value.__annotations__
    vars(new).update({name: memo.enclosed(one) for name, one in vars(value).items()})
    return new


def _cell(_memo: Memo, _value: CellType) -> CellType:
    return CellType()  # filled by the function that has it


def _method(memo: Memo, value: MethodType) -> object:
    return type(value)(memo.copied(value.__func__), memo.copied(value.__self__))


def _builtin(memo: Memo, value: Any) -> object:
    """A method of a built-in class, of a container for instance; a function of a module is shared."""
    owner = value.__self__
    if owner is None or isinstance(owner, (type, ModuleType)):
        return value
    return getattr(memo.copied(owner), value.__name__)


def _cached(memo: Memo, value: Any) -> object:
    if not memo.is_tied(value):
        return value
    return functools.lru_cache(**value.cache_parameters())(memo.copied(value.__wrapped__))


def _reference(memo: Memo, value: Any) -> object:
    """A weak reference to the copy of what it refers to, if that is in the copy."""
    (target,) = tuple(weak_targets(value)) or (None,)
    if target is None or id(target) not in memo._reach.objects:
        return value
    if isinstance(value, PROXIES):
        return weakref.proxy(memo.copied(behind(value)))
    if isinstance(value, weakref.WeakMethod):
        return weakref.WeakMethod(memo.copied(value()))
    return weakref.ref(memo.copied(target)) if type(value) is weakref.ref else value


def _weak_values(memo: Memo, value: Any) -> object:
    new = type(value)()
    memo[id(value)] = new
    for key, one in list(value.items()):
        new[memo.enclosed(key)] = memo.copied(one) if id(one) in memo._reach.objects else one
    return new


def _weak_keys(memo: Memo, value: Any) -> object:
    new = type(value)()
    memo[id(value)] = new
    for key, one in list(value.items()):
        new[memo.copied(key) if id(key) in memo._reach.objects else key] = memo.enclosed(one)
    return new


def _weak_set(memo: Memo, value: Any) -> object:
    return type(value)(memo.copied(one) if id(one) in memo._reach.objects else one for one in list(value))


def _script(memo: Memo, value: Any) -> object:
    """A compiled function without weights in it is shared."""
    if any(node.kindOf("value") == "t" for node in value.graph.findAllNodes("prim::Constant") if node.hasAttributes()):
        raise ModelError(
            "is a traced function that holds weights as constants, so other weights would change nothing",
            where=memo.place(value),
            remedy="Pass the model as it was before torch.jit.trace.",
        )
    return value


# By class, in this order.
_RULES: Final[tuple[tuple[tuple[type, ...], Callable[[Memo, Any], object]], ...]] = (
    (tuple(_LOCKS), _new_lock),
    ((Tensor,), _tensor),
    ((np.ndarray,), _array),
    ((FunctionType,), _function),
    ((CellType,), _cell),
    ((MethodType,), _method),
    ((BuiltinFunctionType,), _builtin),
    ((weakref.WeakValueDictionary,), _weak_values),
    ((weakref.WeakKeyDictionary,), _weak_keys),
    ((weakref.WeakSet,), _weak_set),
    ((weakref.ref, *PROXIES), _reference),
    ((type(functools.lru_cache(len)),), _cached),
    ((torch.jit.ScriptFunction,), _script),
    ((threading.local,), _local),
    ((*SHARED, io.IOBase, threading.Thread, Executor), _share),
    (_RUNNING, _refuse),
)


_EXACT: Final = (list, tuple, set, frozenset, dict, OrderedDict)
_EMPTY: Final = (dict, OrderedDict, list, set)
_PROTOCOL: Final = (
    *("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"),
    *("__getnewargs__", "__getnewargs_ex__"),
)


def _rule(kind: type) -> Callable[[Memo, Any], object] | None:
    """How objects of a class are copied; None: `copy.deepcopy` does it right, and cannot fail."""
    if kind in _EXACT:
        return None
    if kind is functools.partial:  # as `copy.deepcopy` does it, without what pickling is asked for
        return _partial
    for kinds, rule in _RULES:
        if issubclass(kind, kinds):
            return rule
    is_module = issubclass(kind, nn.Module) and not issubclass(kind, _EXACT)
    if is_module and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL):
        return _module
    return _copied_or_shared
