"""What calls of a model change in it besides their results: hidden states, counters and caches.

These lie in Python attributes of its modules and in buffers. Each recorded call keeps what it found, so that it can be
made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from torch import Tensor, nn

from pared.model.recorded import values
from pared.model.recorded.entries import Entries
from pared.model.tensors import version_of

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
Entry = tuple[str, str]  # a module's name, and an attribute or buffer of it

_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


class _Absent:
    """Stands for an attribute that is not there."""

    def __deepcopy__(self, _memo: object) -> _Absent:
        return self


_ABSENT: Final = _Absent()


class StateWatch:
    """Finds out which attributes and buffers the calls of a model change.

    Args:
        model: as it is before the first call; later it is looked at before and after each call.

    Attributes:
        changed: the attributes and buffers that were different after a call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = [
            (name, module, type(module).__module__.startswith("torch.nn.")) for name, module in model.named_modules()
        ]
        # PyTorch's own modules change nothing but buffers.
        self._watched = [one for one in self._watched if not one[2] or one[1]._buffers]
        self._fixed: dict[int, tuple[str, object]] = {
            **{id(tensor): (name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False)},
            **{id(module): (name, module) for name, module in model.named_modules(remove_duplicate=False)},
        }
        self.changed: dict[Entry, None] = {}
        self._first: dict[Entry, object] = self._copied(self._current())

    def _current(self) -> dict[Entry, object]:
        found: dict[Entry, object] = {}
        for name, module, builtin in self._watched:
            if not builtin:
                for attribute, value in vars(module).items():
                    if attribute not in _OF_EVERY_MODULE:
                        found[name, attribute] = value
            for attribute, value in module._buffers.items():
                found[name, attribute] = value
        return found

    def _copied(self, entries: Mapping[Entry, object]) -> dict[Entry, object]:
        known = {key: one for key, (_, one) in self._fixed.items()}
        given = dict(entries)
        copied = values.copied(given, known)
        if copied is not given:
            return copied
        return {entry: values.copied(value, known) for entry, value in given.items()}  # all but what cannot be copied

    def before(self) -> Moment:
        """The state as it is now, before a call."""
        current = self._current() if self.changed else {}
        return Moment(self, self._copied({entry: current.get(entry, _ABSENT) for entry in self.changed}))

    def after(self) -> None:
        """Find what the last call changed."""
        current = self._current()
        known: dict[tuple[int, int], bool] = {}  # a configuration is an attribute of many modules
        for entry in {**self._first, **current}:
            if entry in self.changed:
                continue
            old, new = self._first.get(entry, _ABSENT), current.get(entry, _ABSENT)
            pair = (id(old), id(new))
            if old is not new and pair not in known:
                known[pair] = values.same(old, new)
            if old is not new and not known[pair]:
                log.debug("a call changes %s of %s", entry[1], entry[0] or "the model")
                self.changed[entry] = None

    def only_changes(self) -> None:
        """Forget everything that no call changed."""
        self._first = {entry: self._first.get(entry, _ABSENT) for entry in self.changed}

    def at(self, own: Mapping[Entry, object], model: nn.Module) -> dict[Entry, object]:
        """A copy of a state for another model of the architecture."""
        tensors = dict(model.named_parameters(remove_duplicate=False))
        modules = dict(model.named_modules(remove_duplicate=False))
        known = {
            key: (tensors if isinstance(one, Tensor) else modules).get(name, one)
            for key, (name, one) in self._fixed.items()
        }
        entries = {entry: own.get(entry, self._first.get(entry, _ABSENT)) for entry in self.changed}
        return values.copied(entries, known)


class Attributes:
    """What the Python attributes of modules hold, as it is now, and whether that changes later.

    Args:
        modules: those of PyTorch's own classes change nothing but buffers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = list(modules)
        self._modules = [one for one in every if not _is_builtin(one)]
        self._buffered = [one for one in every if one._buffers]
        self.renew()

    def renew(self) -> None:
        """Take what they hold now for what they should hold."""
        self._held = [
            (vars(module), name, value) for module in self._modules for name, value in _attributes_of(module).items()
        ]
        self._entries = Entries(self._held)
        self._dicts = list(map(vars, self._modules))
        self._counts = list(map(len, self._dicts))

    def changed(self) -> str:
        """The name of an attribute that was set to something else, added or deleted; empty if none was."""
        counts = list(map(len, self._dicts))
        if counts == self._counts and self._entries.are_as_they_were():
            return ""
        for held, name, value in self._held:
            if held.get(name) is not value and not _is_plainly_same(held.get(name), value):
                return name
        for module, now, count in zip(self._modules, counts, self._counts, strict=True):
            if now != count:  # an attribute may stand before one of its class
                known = {name for held, name, _ in self._held if held is vars(module)}
                return next((name for name in _attributes_of(module) if name not in known), "")
        return ""

    def changed_by(self, call: Callable[[], ValueT]) -> tuple[ValueT, str]:
        """What a call gives, and the name of an attribute or a buffer that it sets, or within which it sets something.

        What is set to other tensors with the same numbers is changed, too: for other inputs they might be others.
        """
        before = self._leaves()
        found = call()
        after = self._leaves()
        for place in {**before, **after}:
            old, new = before.get(place, (_ABSENT, 0)), after.get(place, (_ABSENT, 0))
            if old[1] != new[1] or (old[0] is not new[0] and not _is_plainly_same(old[0], new[0])):
                return found, str(place[0][1]).partition(" ")[2]
        return found, ""

    def _leaves(self) -> dict[values.Place, tuple[object, int]]:
        """What all attributes and buffers are made of, and how often each was written to."""
        entries: list[Mapping[str, object]] = [_attributes_of(module) for module in self._modules]
        entries += [module._buffers for module in self._buffered]
        held = {f"{index} {name}": value for index, one in enumerate(entries) for name, value in one.items()}
        return {
            place: (leaf, version_of(leaf) if isinstance(leaf, Tensor) else 0) for place, leaf in values.leaves(held)
        }


def _attributes_of(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and not name.startswith("_pared")
    }


def _is_builtin(module: nn.Module) -> bool:
    """Whether a module, or what a counterpart stands for, is PyTorch's own."""
    own = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("pared."))
    return own.__module__.startswith("torch.nn.")


def _is_plainly_same(a: object, b: object) -> bool:
    return type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b


class Moment:
    """The state of a model before one call.

    Args:
        watch: knows what calls change.
        own: what was known to change by then, as it was before the call; all else was as it was before the first.
    """

    def __init__(self, watch: StateWatch, own: Mapping[Entry, object]) -> None:
        self._watch, self._own = watch, own

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of what calls change, such as "encoder.hidden"."""
        return tuple(".".join(filter(None, entry)) for entry in self._watch.changed)

    @property
    def nbytes(self) -> int:
        """The bytes of tensors that this moment holds."""
        return values.nbytes(dict(self._own))

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Let a model of the same architecture have this state inside, and its own again afterwards."""
        modules = dict(model.named_modules(remove_duplicate=False))
        state = {e: v for e, v in self._watch.at(self._own, model).items() if e[0] in modules}
        kept = {(name, attribute): _get(modules[name], attribute) for name, attribute in state}
        for (name, attribute), value in state.items():
            _set(modules[name], attribute, value)
        try:
            yield
        finally:
            for (name, attribute), value in kept.items():
                _set(modules[name], attribute, value)


def _get(module: nn.Module, attribute: str) -> object:
    found = module._buffers if attribute in module._buffers else vars(module)
    return found.get(attribute, _ABSENT)


def _set(module: nn.Module, attribute: str, value: Any) -> None:
    """Set it where it was, past what the class makes of assignments."""
    if value is _ABSENT:
        module._buffers.pop(attribute, None)
        vars(module).pop(attribute, None)
    elif attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        vars(module)[attribute] = value
