"""What decides how a model's call is captured, as a key: a graph that was kept is taken for the same key only."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import nn

import pared
from pared.runtime.graphs.call_kinds import Argument

_OWN: Final = ("torch", "pared")  # packages whose versions are a part of every key
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_GROUPS: Final = (dict, list, tuple, set, frozenset)
_NAMED_APART: Final = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # of a module
_OTHER_HOOKS: Final = ("_state_dict_", "_load_state_dict_", "_backward_")  # of a module, that no call runs
# Notes of transformers: how weights were made, and a hash that is another one in every process.
_NOTES: Final = ("_is_hf_initialized", "_original_object_hash")
_MOST_FILES: Final = 1000
_MOST_NUMBERS: Final = 1000  # of a tensor that is neither a parameter nor a buffer
_MOST_PARTS: Final = 500_000
_DEEPEST: Final = 20


class UnknownError(Exception):
    """Something decides what a model computes that no key can tell."""


def key_of(model: nn.Module, arguments: Sequence[Argument]) -> str:
    """A key for a model's architecture, its code, and a call; weights do not count, as graphs do not hold them.

    Installed code is told by the version of its package; other code by the size and age of the files beside it, and
    what it names outside of itself by its value.

    Args:
        model: a float model.
        arguments: an example call.

    Raises:
        UnknownError: the model holds something that no key can tell, or its code is in no file.
    """
    found = _Description(model)
    for one in arguments:
        found.add(f"{one.kind} {one.shape}")
    found.add_model(model)
    digest = hashlib.sha256()
    for part in (*_surroundings(), *found.parts, *_code(found.modules)):
        digest.update(part.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _surroundings() -> Iterator[str]:
    """The versions of what captures, and settings of the process that decide which tensors code makes."""
    yield from (pared.__version__, str(torch.__version__), platform.python_version(), platform.machine())
    yield f"{torch.get_default_dtype()} {torch.get_default_device()} {torch.is_autocast_enabled('cpu')}"


class _Description:
    """What a model is, as far as code may depend on it.

    Attributes:
        parts: the description.
        modules: the names of the Python modules whose code may run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts: list[str] = []
        self.modules: set[str] = set()
        self._known: dict[int, str] = {}  # by the object's identity; what comes again is named, not described
        for name, module in model.named_modules():
            self._known[id(module)] = f"module {name}"
            for tensors in (module._parameters, module._buffers):
                for attribute, tensor in tensors.items():
                    self._known.setdefault(id(tensor), f"tensor {name}.{attribute}")
        self._held: list[object] = []  # an identity is that of another object when the first is gone
        self._types: set[type] = set()
        self._read: set[tuple[str, str]] = set()  # what code finds in modules that it names

    def add(self, part: str) -> None:
        self.parts.append(part)
        if len(self.parts) > _MOST_PARTS:
            raise UnknownError("it holds too much")

    def add_model(self, model: nn.Module) -> None:
        for name, module in model.named_modules(remove_duplicate=False):
            self.add(f"{name}: {self._known[id(module)]}")
            if self._known[id(module)] != f"module {name}":
                continue  # it has come before
            self._add_type(type(module))
            for tensors in (module._parameters, module._buffers):
                for attribute, tensor in tensors.items():
                    held = None if tensor is None else (tuple(tensor.shape), tensor.dtype, self._known[id(tensor)])
                    self.add(f"{attribute}: {held}")
            self._add_state(module, 0)

    def _add_value(self, value: Any, depth: int = 0) -> None:
        if isinstance(value, _PLAIN):
            self.add(f"{type(value).__name__} {value!r}")
        elif id(value) in self._known:
            self.add(self._known[id(value)])
        elif depth > _DEEPEST:
            raise UnknownError("deeply nested attributes")
        else:
            self._known[id(value)] = f"part {len(self.parts)}"
            self._held.append(value)
            self._add_new(value, depth + 1)

    def _add_new(self, value: Any, depth: int) -> None:
        """Describe what has not come before."""
        if isinstance(value, type):
            self._add_type(value)
        elif isinstance(value, FunctionType):
            self._add_function(value, depth)
        elif isinstance(value, ModuleType):
            self.modules.add(value.__name__)
            self.add(value.__name__)
        elif isinstance(value, (MethodType, BuiltinFunctionType, MethodDescriptorType)):
            self.add(value.__qualname__)
            for part in ("__func__", "__self__", "__objclass__"):
                self._add_value(getattr(value, part, None), depth)
        elif isinstance(value, functools.partial):
            self._add_value((value.func, value.args, value.keywords), depth)
        elif isinstance(value, weakref.ref):
            self._add_value(value(), depth)
        elif isinstance(value, torch.Tensor):
            if value.is_meta or value.numel() > _MOST_NUMBERS:  # a graph holds their numbers
                raise UnknownError("a large tensor that is neither a parameter nor a buffer")
            self.add(f"{tuple(value.shape)} {value.dtype} {value.tolist()}")
        elif isinstance(value, nn.Module):
            raise UnknownError("a module that is not registered")
        else:
            self._add_type(type(value))
            if isinstance(value, _GROUPS):
                self._add_group(value, depth)
            elif not hasattr(value, "__dict__"):
                raise UnknownError(f"an attribute of type {type(value).__name__}")
            self._add_state(value, depth)

    def _add_group(self, value: Any, depth: int) -> None:
        self.add(f"{len(value)}")
        for held in sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value:
            self._add_value(held, depth)
            if isinstance(value, dict):
                self._add_value(value[held], depth)

    def _add_state(self, value: object, depth: int) -> None:
        """The attributes of an object."""
        if any(vars(base).get("__slots__") for base in type(value).__mro__):
            raise UnknownError(f"an attribute of type {type(value).__name__}, which has slots")
        of_module = isinstance(value, nn.Module)
        for name, held in vars(value).items() if hasattr(value, "__dict__") else ():
            if name in _NOTES or (of_module and (name in _NAMED_APART or name.startswith(_OTHER_HOOKS))):
                continue
            self.add(f".{name}")
            self._add_value(held, depth)
        self.add("end")

    def _add_type(self, cls: type) -> None:
        """The name of a class and what is set in it, which need not be what its file says."""
        self.add(_name_of(cls))
        if cls in self._types:
            return
        self._types.add(cls)
        for base in cls.__mro__:
            if _is_own(base.__module__):
                continue
            self.modules.add(base.__module__)
            installed = _is_installed(base.__module__)
            if installed and "<locals>" in base.__qualname__:
                raise UnknownError(f"a function made {_name_of(base)}")
            for name, member in vars(base).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if isinstance(function, FunctionType):
                    self.add(f"{name} {_name_of(function)}")
                    if not installed:
                        self._add_value(function)
                elif isinstance(member, (*_PLAIN, *_GROUPS)) and not name.startswith("__"):
                    self.add(name)
                    self._add_value(member)

    def _add_function(self, function: FunctionType, depth: int) -> None:
        """A function: its name, what it was made with, and, where no version tells it, what it says and names."""
        self.add(_name_of(function))
        self.modules.add(str(function.__module__))
        for held in (function.__defaults__, function.__kwdefaults__):
            self._add_value(held, depth)
        for cell in function.__closure__ or ():
            self._add_value(_content(cell), depth)
        if not _is_installed(str(function.__module__)):
            names = self._add_code(function.__code__)
            for name in sorted(names & function.__globals__.keys()):
                self.add(name)
                self._add_global(function.__globals__[name], names, depth)

    def _add_code(self, code: CodeType) -> set[str]:
        """What a function says; and the names that it uses."""
        names = set(code.co_names)
        self.add(f"{code.co_code.hex()} {code.co_names}")
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names |= self._add_code(constant)
            else:
                self.add(repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant))
        return names

    def _add_global(self, value: Any, names: set[str], depth: int) -> None:
        """What code finds under a global name."""
        if isinstance(value, ModuleType):
            self.modules.add(value.__name__)
            for name in () if _is_installed(value.__name__) else sorted(names & vars(value).keys()):
                if (value.__name__, name) not in self._read:
                    self._read.add((value.__name__, name))
                    self.add(f"{value.__name__}.{name}")
                    self._add_global(vars(value)[name], names, depth)
            return
        plain = isinstance(value, (*_PLAIN, *_GROUPS, type, FunctionType, functools.partial, torch.Tensor))
        if plain or not _is_own(type(value).__module__):  # the rest are loggers and the like
            self._add_value(value, depth)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _name_of(value: type | FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _top(module: str) -> str:
    return module.partition(".")[0]


def _is_own(module: str) -> bool:
    return _top(module) in _OWN or _is_standard(module)


def _is_standard(module: str) -> bool:
    return _top(module) in sys.stdlib_module_names


def _is_installed(module: str) -> bool:
    """Whether the version of its package tells what a Python module says; of one that is being written it does not."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return _is_own(module) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _code(modules: set[str]) -> Iterator[str]:
    """The versions of packages, and the files of code that no version tells."""
    folders: set[Path] = set()
    for name in sorted(one for one in modules if not _is_own(one)):
        version = getattr(sys.modules.get(_top(name)), "__version__", None)
        if isinstance(version, str) and _is_installed(name):
            yield f"{_top(name)} {version}"
            continue
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None:
            raise UnknownError(f"the code of {name} is in no file")
        folders.add(Path(file).parent)
    files = sorted({file for folder in folders for file in folder.glob("*.py")})
    if len(files) > _MOST_FILES:
        raise UnknownError(f"{len(files)} files of code")
    for file in files:
        seen = file.stat()
        yield f"{file} {seen.st_size} {seen.st_mtime_ns}"
