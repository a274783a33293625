"""State that modules keep with `get_extra_state` and `set_extra_state`, as plain data: neither pickled nor executed.

A state is a tree of JSON values. What JSON lacks is an object with one key, its kind: `{"tuple": [...]}`,
`{"dict": [[key, value], ...]}`, `{"tensor": 0}` for the first of its tensors. `docs/format.md` lists all kinds.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from pared.artifact.beside.states import DEVICE
from pared.errors import MismatchError, ModelError
from pared.formats.coded import RAW_TYPES, dtype_name

KEY: Final = "_extra_state"  # torch's name for it in a state dict, after the module's name
_DEEPEST: Final = 32
_MOST_BITS: Final = 1024  # of whole numbers
_ORDINARY: Final = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class ExtraState:
    """The extra state of one module.

    Args:
        tree: JSON values.
        tensors: those that the tree refers to by their place, on the CPU.
    """

    tree: Any
    tensors: tuple[Tensor, ...] = ()


def collect(model: nn.Module) -> dict[str, ExtraState]:
    """The extra states of a model's modules, by their names in a state dict.

    Raises:
        ModelError: a state is not plain data, or a module does not give it.
    """
    return {key: _collected(key, module) for key, module in _having(model)}


def restore(model: nn.Module, states: Mapping[str, ExtraState]) -> tuple[str, ...]:
    """Give each module the state that was stored for it.

    Returns:
        the names of the states that the model's modules have, and that are not stored: they are what they were.

    Raises:
        MismatchError: a module has no such state, or does not take it.
    """
    modules = dict(_having(model))
    for name, state in states.items():
        if name not in modules:
            raise MismatchError(
                "the artifact holds extra state of this module, which has no set_extra_state of its own",
                where=name,
                remedy="Build the model with the classes that the artifact was made from.",
            )
        try:
            modules[name].set_extra_state(_restored(state))
        except Exception as error:
            raise MismatchError(
                f"set_extra_state raised {type(error).__name__}: {error}",
                where=name,
                remedy="Build the model with the classes that the artifact was made from.",
            ) from error
    return tuple(name for name in modules if name not in states)


def _having(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have extra state, each under every name that its state has in a state dict."""
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{KEY}".removeprefix("."), module


def _collected(key: str, module: nn.Module) -> ExtraState:
    where = key.removesuffix(KEY).removesuffix(".") or type(module).__name__
    try:
        value = module.get_extra_state()
    except Exception as error:
        raise ModelError(
            f"its get_extra_state raised {type(error).__name__}: {error}",
            where=where,
            remedy="Call model.state_dict() yourself; the traceback above shows where it failed.",
        ) from error
    tensors: list[Tensor] = []
    return ExtraState(_tree(value, tensors, where, "", 0), tuple(tensors))


def _tree(value: Any, tensors: list[Tensor], where: str, path: str, depth: int) -> Any:
    """A value as JSON; tensors, and what holds bytes, are appended to the list."""
    if depth > _DEEPEST:
        raise _refused("nests containers too deeply", where, path)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        value = value.item()
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and value.bit_length() <= _MOST_BITS):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}

    def inner(one: Any, key: object) -> Any:
        return _tree(one, tensors, where, f"{path}[{key!r}]", depth + 1)

    if kind is list:
        return [inner(one, i) for i, one in enumerate(value)]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [inner(one, i) for i, one in enumerate(value)]}
    if kind in (dict, OrderedDict):
        tag = "dict" if kind is dict else "ordered"
        return {tag: [[inner(key, "a key"), inner(one, key)] for key, one in value.items()]}
    if kind is complex and math.isfinite(value.real) and math.isfinite(value.imag):
        return {"complex": [value.real, value.imag]}
    if kind is torch.dtype:
        return {"dtype": dtype_name(value)}
    if kind is torch.device and DEVICE.fullmatch(str(value)):
        return {"device": str(value)}
    held = _as_tensor(value)
    if held is None:
        raise _refused(f"holds a {kind.__module__}.{kind.__qualname__}", where, path)
    tensors.append(held[1])
    return {held[0]: len(tensors) - 1}


def _as_tensor(value: Any) -> tuple[str, Tensor] | None:
    """A value whose content is numbers or bytes, as its kind and a tensor."""
    if type(value) in _ORDINARY:
        usable = value.layout is torch.strided and not value.is_meta and dtype_name(value.dtype) in RAW_TYPES
        return ("tensor", value.detach().cpu().clone()) if usable and not value.is_quantized else None
    if type(value) is np.ndarray:
        named = str(value.dtype) in RAW_TYPES
        return ("array", torch.from_numpy(np.ascontiguousarray(value).copy()).reshape(value.shape)) if named else None
    reader = _READERS.get(type(value))
    if reader is None:
        return None
    kind, read = reader
    content = bytearray(read(value))
    # A buffer of no bytes is not accepted.
    return kind, torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: len(content)]


# How the bytes are read of what holds bytes, by type, with its kind.
_READERS: Final[Mapping[type, tuple[str, Callable[[Any], bytes]]]] = {
    bytes: ("bytes", bytes),
    bytearray: ("bytearray", bytes),
    io.BytesIO: ("stream", io.BytesIO.getvalue),
}
_SEQUENCES: Final[Mapping[type, str]] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}


def _refused(what: str, where: str, path: str) -> ModelError:
    return ModelError(
        f"its extra state {what}{f' at {path}' if path else ''}, which only a pickle could store",
        where=where,
        remedy="Let get_extra_state return plain data: numbers, texts, bytes, tensors, and lists, tuples and dicts of "
        "them.",
    )


# How each kind is made from what its object holds, all of whose parts have been made.
_MAKERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "float": float,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
    "dict": dict,
    "ordered": OrderedDict,
    "complex": lambda parts: complex(*parts),
    "dtype": lambda name: RAW_TYPES.get(name) or getattr(torch, name),
    "device": torch.device,
}
_CONTENTS: Final[Mapping[str, Callable[[Tensor], Any]]] = {
    "tensor": Tensor.clone,
    "array": lambda tensor: tensor.numpy().copy(),
    "bytes": lambda tensor: tensor.numpy().tobytes(),
    "bytearray": lambda tensor: bytearray(tensor.numpy().tobytes()),
    "stream": lambda tensor: io.BytesIO(tensor.numpy().tobytes()),
}


def _restored(state: ExtraState) -> Any:
    def made(tree: Any) -> Any:
        if isinstance(tree, list):
            return [made(one) for one in tree]
        if not isinstance(tree, dict):
            return tree
        ((kind, inside),) = tree.items()
        if kind in _CONTENTS:
            return _CONTENTS[kind](state.tensors[inside])
        if kind in ("dict", "ordered"):
            return _MAKERS[kind]([(made(key), made(value)) for key, value in inside])
        return _MAKERS[kind](made(inside))

    return made(state.tree)
