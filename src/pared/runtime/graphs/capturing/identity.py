"""What decides how a model's call is captured, as a key: a graph that was kept is taken for the same key only."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Final

import torch
from torch import nn

import pared
from pared.runtime.graphs.call_kinds import Argument

_OWN: Final = ("torch", "builtins", "pared", "collections")  # packages whose versions are a part of every key
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Named apart, or notes of transformers on how weights were made.
_LEFT_OUT: Final = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_hf_initialized")
_MOST_FILES: Final = 1000
_DEEPEST: Final = 4


class UnknownError(Exception):
    """Something decides what a model computes that no key can tell."""


def key_of(model: nn.Module, arguments: Sequence[Argument]) -> str:
    """A key for a model's architecture, its code, and a call; weights do not count, as graphs do not hold them.

    Code is told by the version of its package or, where it has none, by the size and age of the files beside it.

    Args:
        model: a float model.
        arguments: an example call.

    Raises:
        UnknownError: the model holds something that no key can tell, or its code is in no file.
    """
    digest = hashlib.sha256()
    for part in _parts(model, arguments):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(model: nn.Module, arguments: Sequence[Argument]) -> Iterator[str]:
    yield from (pared.__version__, str(torch.__version__), platform.python_version(), platform.machine())
    yield from (f"{one.kind} {one.shape}" for one in arguments)
    places: dict[int, str] = {}
    modules: dict[int, str] = {}
    packages: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"{name}: {modules.setdefault(id(module), name)}"
        if modules[id(module)] != name:
            continue  # it has come before
        yield _name_of(type(module))
        packages |= {one.__module__ for one in type(module).__mro__}
        for tensors in (module._parameters, module._buffers):
            for attribute, tensor in tensors.items():
                held = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
                yield f"{attribute}: {held} {places.setdefault(id(tensor), f'{name}.{attribute}')}"
        rest = {key: value for key, value in vars(module).items() if key not in _LEFT_OUT}
        yield from _values(rest, 0)
        for value in vars(module).values():
            if callable(value) and not isinstance(value, nn.Module):
                packages.add(getattr(value, "__module__", None) or "")
    yield from _code(packages)


def _values(value: Any, depth: int) -> Iterator[str]:
    """What a value is, as far as code may depend on it."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif depth > _DEEPEST:
        raise UnknownError("deeply nested attributes")
    elif isinstance(value, dict):
        for key, held in value.items():
            yield f"{key}:"
            yield from _values(held, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield type(value).__name__
        for held in sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value:
            yield from _values(held, depth + 1)
    elif isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)} {value.dtype}"
        if not value.is_meta and value.numel() <= _MOST_FILES:
            yield repr(value.tolist())
    elif isinstance(value, nn.Module):
        yield _name_of(type(value))
    elif isinstance(value, type) or callable(value):
        yield _name_of(value)
    elif hasattr(value, "__dict__"):
        yield _name_of(type(value))
        yield from _values(vars(value), depth + 1)
    else:
        raise UnknownError(f"an attribute of type {type(value).__name__}")


def _name_of(value: Callable[..., Any]) -> str:
    name = getattr(value, "__qualname__", "")
    if not name or "<locals>" in name or "<lambda>" in name or isinstance(value, MethodType):
        if isinstance(value, FunctionType):
            code = value.__code__
            if value.__closure__:
                raise UnknownError("a function that was made by another")
            return f"{code.co_code.hex()} {code.co_consts!r} {code.co_names}"
        name = _name_of(type(value)) if not isinstance(value, type) else name
    return f"{getattr(value, '__module__', '')}.{name}"


def _code(modules: set[str]) -> Iterator[str]:
    """The versions of packages, and the files of code that is in none."""
    folders: set[Path] = set()
    for top in sorted({name.partition(".")[0] for name in modules} - set(_OWN)):
        version = getattr(sys.modules.get(top), "__version__", None)
        if isinstance(version, str):
            yield f"{top} {version}"
            continue
        for name in sorted(one for one in modules if one.partition(".")[0] == top):
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
