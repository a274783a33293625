"""Extra state of modules in a pickled state dict, as plain data. Nothing that a pickle names is called.

`docs/format.md` says how a state is written down as a tree of JSON values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pared.files.checks import Place
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Name, Node
from pared.formats.dtypes import ITEM_SIZES, TYPES
from pared.readers.listing import EXTRA_STATE, ListedState, ListedTensor
from pared.readers.torch.pickled import tensor_of

_DEEPEST: Final = 32
_DEEPEST_DICTS: Final = 8  # dictionaries around a state dict
_MOST_BITS: Final = 1024
_STEP_NBYTES: Final = 400  # of a value and its place in a tree; never given back, so that what is shared cannot unfold
_OF_BUILTINS: Final = ("builtins.", "__builtin__.")
_SEQUENCES: Final[Mapping[str, str]] = {"set": "set", "frozenset": "frozenset", "tuple": "tuple"}


def states_of(root: object, sizes: Mapping[str, int], where: str, memory: MemoryLimit) -> dict[str, ListedState]:
    """The extra states in the dictionaries that a pickle describes, by name; those that are a tensor are left out.

    Args:
        root: the root from `read_pickle`.
        sizes: the size of each storage in bytes.
        where: the file's name, for error messages.
        memory: for the trees, which may be far larger than the pickle.

    Raises:
        CorruptError: a tensor in a state contradicts itself.
        UnsafeError: the memory limit would be exceeded.
    """
    found: dict[str, ListedState] = {}
    waiting: list[tuple[str, object, int]] = [("", root, 0)]
    entered: set[int] = set()
    while waiting:
        name, node, depth = waiting.pop()
        if not isinstance(node, Node) or id(node) in entered or depth > _DEEPEST_DICTS or not _is_dict(node):
            continue
        entered.add(id(node))
        for key, value in node.pairs:
            if not isinstance(key, str):
                continue
            is_state = key.rpartition(".")[2] == EXTRA_STATE
            if not is_state and not (isinstance(value, Node) and _is_dict(value)):
                continue
            path = f"{name}/{key}" if name else key
            memory.take(_STEP_NBYTES + len(path))
            if not is_state:
                waiting.append((path, value, depth + 1))
            elif (state := _Reader(path, sizes, Place(f"{where}: {path}"), memory).read(value)) is not None:
                found[path] = state
    return found


def plain_of(root: object, named: Iterable[str]) -> tuple[str, ...]:
    """The outermost entries of the dictionary that a pickle describes which lead to nothing that has a name.

    Args:
        root: the root from `read_pickle`.
        named: the names of tensors and extra states.
    """
    if not isinstance(root, Node) or not _is_dict(root):
        return ()
    tops = {name.partition("/")[0] for name in named}
    return tuple(key for key, _ in root.pairs if isinstance(key, str) and key.partition("/")[0] not in tops)


def _is_dict(node: Node) -> bool:
    return node.call is None or (isinstance(node.call, Name) and node.call.path == "collections.OrderedDict")


class _RefusedError(Exception):
    """A value that is more than plain data; its text says what."""


class _Reader:
    """Writes one state down as a tree."""

    def __init__(self, name: str, sizes: Mapping[str, int], at: Place, memory: MemoryLimit) -> None:
        self._name = name
        self._sizes = sizes
        self._at = at
        self._memory = memory
        self._parts: list[ListedTensor | bytes] = []

    def read(self, value: object) -> ListedState | None:
        if isinstance(value, Node) and tensor_of(value, self._name, self._sizes, self._at) is not None:
            return None
        try:
            return ListedState(self._tree(value, 0), tuple(self._parts))
        except _RefusedError as refused:
            return ListedState(None, (), str(refused))

    def _tree(self, value: object, depth: int) -> Any:
        self._memory.take(_STEP_NBYTES)
        if depth > _DEEPEST:
            raise _RefusedError("nests containers too deeply")
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, bytes):
            return self._part("bytes", value)
        if isinstance(value, Name) and (kind := value.path.removeprefix("torch.")) in TYPES:
            return {"dtype": kind}
        if isinstance(value, Node):
            tree = self._container(value, depth) if value.call is None else self._called(value, depth)
            if tree is not None:
                return tree
        what = value.path if isinstance(value, Name) else type(value).__name__
        raise _RefusedError(f"holds {what}")

    def _container(self, node: Node, depth: int) -> Any:
        if node.states or node.kind not in ("list", "tuple", "set", "frozenset", "dict"):
            raise _RefusedError("holds an object of another kind")
        if node.kind == "dict":
            return self._pairs("dict", node, depth)
        inside = [self._tree(one, depth + 1) for one in node.values]
        return inside if node.kind == "list" else {node.kind: inside}

    def _pairs(self, kind: str, node: Node, depth: int) -> Any:
        return {kind: [[self._tree(key, depth + 1), self._tree(value, depth + 1)] for key, value in node.pairs]}

    def _called(self, node: Node, depth: int) -> Any:
        """What a pickle would make by a call, where that is plain data."""
        path = node.call.path if isinstance(node.call, Name) else ""
        held = tensor_of(node, f"{self._name}/{len(self._parts)}", self._sizes, self._at)
        if held is not None:
            if held.storage is None or held.dtype not in ITEM_SIZES:
                raise _RefusedError(f"holds a tensor of {held.dtype} that no artifact can hold")
            return self._part("tensor", held)
        if path == "collections.OrderedDict" and not node.arguments and not node.states:
            return self._pairs("ordered", node, depth)
        first = node.arguments[0] if node.arguments else None
        name = next((path.removeprefix(prefix) for prefix in _OF_BUILTINS if path.startswith(prefix)), "")
        if path == "_io.BytesIO" and node.states and isinstance(state := node.states[-1], Node) and state.values:
            return self._part("stream", self._bytes(state.values[0]))
        if path == "_codecs.encode" or name == "bytes":
            return self._part("bytes", self._bytes(node))
        if name == "bytearray":
            return self._part("bytearray", self._bytes(node) if isinstance(first, str) else self._bytes(first))
        if name in _SEQUENCES and isinstance(first, Node) and first.call is None:
            return {_SEQUENCES[name]: [self._tree(one, depth + 1) for one in first.values]}
        if path == "torch.Size" and isinstance(first, Node):
            return {"size": [self._tree(one, depth + 1) for one in first.values]}
        if name == "complex" and all(isinstance(one, float) and math.isfinite(one) for one in node.arguments):
            return {"complex": list(node.arguments)}
        raise _RefusedError(f"holds {path or 'an object'}")

    def _bytes(self, value: object) -> bytes:
        """The content of bytes, which old pickles hold as text in Latin-1."""
        if value is None:
            return b""
        if isinstance(value, bytes):
            return value
        if isinstance(value, Node):
            if not value.arguments:
                return b""
            text, *encoding = value.arguments
            if isinstance(text, str) and [str(one).replace("-", "") for one in encoding] == ["latin1"]:
                return text.encode("latin-1")
        raise _RefusedError("holds bytes in an unknown form")

    def _part(self, kind: str, content: ListedTensor | bytes) -> dict[str, int]:
        self._parts.append(content)
        return {kind: len(self._parts) - 1}
