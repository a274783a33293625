"""Read what a pickle describes, without running it.

A pickle is a program for a machine with a stack, and some of its instructions call whatever they name. The machine
here has no instruction that imports or calls anything: where Python would call a function, it writes down the name
and the arguments. Names whose code would run if the file were loaded are collected. The standard library's
`pickletools` cuts the bytes into instructions.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from pared.errors import CorruptError, UnsafeError
from pared.files.memory_limit import MemoryLimit
from pared.switches import ignoring

_SMALL: Final = 16 << 20  # any text in a pickle of at most this size is within the limit
_MOST_IMPORTS: Final = 1000  # names beyond these are not collected
_STACK_NBYTES: Final = 24  # of a place on the stack, until it is taken from there
_MARK_NBYTES: Final = 56
_PLACE_NBYTES: Final = 8  # of a place in a list
_LIST_NBYTES: Final = 64  # of a list of one, or a tuple of up to three; of others beside the places
_NODE_NBYTES: Final = 80 + _STACK_NBYTES  # with its place on the stack
_NAME_NBYTES: Final = 64  # beside its characters
_MEMO_NBYTES: Final = 12  # of a place in the memo, if the places are numbered one after the other ...
_FAR_NBYTES: Final = 160  # ... and otherwise
_PAIR_NBYTES: Final = 72
_MOST_BYTES_PER_CHARACTER: Final = 5  # of a text: its bytes, and up to four for each character


@dataclass(frozen=True, slots=True)
class Name:
    """A function, class or constant that a pickle refers to, with its module: "collections.OrderedDict"."""

    path: str


@dataclass(eq=False, slots=True)
class Node:
    """An object that holds others. Compared by identity, so that deep ones cost nothing.

    Args:
        call: what would be called to make it: a name, or a node if the pickle makes the callable too; None for a
            plain tuple, list, set or dict.
        arguments: the call's.
        values: its elements.
        pairs: the keys and values of a dict.
        states: what would be set as its attributes.
        kind: which plain container it is: "tuple", "list", "set", "frozenset" or "dict".
    """

    call: Name | Node | None = None
    arguments: Sequence[object] = ()
    values: Sequence[object] = ()
    pairs: Sequence[tuple[object, object]] = ()
    states: Sequence[object] = ()
    kind: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Persistent:
    """A reference to something outside the pickle; for torch, to a storage."""

    fields: Sequence[object]


@dataclass(frozen=True, eq=False)
class Pickle:
    """What a pickle describes.

    Args:
        root: the object: a plain value, `Node`, `Name` or `Persistent`.
        imports: the names it refers to that its reader does not know as harmless, each once.
        references: everything outside itself that it refers to.
        nbytes: its length in bytes.
    """

    root: object
    imports: tuple[str, ...]
    references: tuple[Persistent, ...]
    nbytes: int


def read_pickle(data: bytes | memoryview, harmless: Container[str], where: str, memory: MemoryLimit) -> Pickle:
    """Read what a pickle describes; nothing that it names is imported or called.

    Args:
        data: the pickle; more bytes may follow it.
        harmless: the names that need not be reported, as dotted paths.
        where: the file's name, for messages.
        memory: how much it may take.

    Raises:
        UnsafeError: it uses instructions that only code could interpret, or takes too much memory.
        CorruptError: it is malformed.

    >>> import pickle
    >>> read_pickle(pickle.dumps({"epoch": 3}), (), "file", MemoryLimit("file", 100)).root.pairs
    [('epoch', 3)]
    """
    machine = _Machine(harmless, where, memory)
    stream = io.BytesIO(data) if len(data) <= _SMALL else _Stream(memoryview(data), memory)
    try:
        # Strings of the oldest protocol may hold escapes that Python deprecates: a reader can do nothing about that.
        with ignoring(DeprecationWarning):
            machine.run(stream)
        return Pickle(machine.pop(), tuple(sorted(machine.imports)), tuple(machine.references), stream.tell())
    except UnsafeError:  # which is also a ValueError
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"its pickle is malformed: {_shown(str(error))}", where=where) from error


def _shown(text: str) -> str:
    return text[:160].encode("unicode_escape").decode("ascii")


class _Stream:
    """The bytes of a large pickle as a stream for `pickletools`; memory for long reads is counted first."""

    _LONGEST_LINE: Final = 1 << 20

    def __init__(self, data: memoryview, memory: MemoryLimit) -> None:
        self.data = data
        self.memory = memory
        self.position = 0

    def read(self, length: int) -> bytes:
        length = max(0, min(length, len(self.data) - self.position))
        self.memory.take(length * _MOST_BYTES_PER_CHARACTER)
        self.memory.give(length * _MOST_BYTES_PER_CHARACTER)  # what is kept of it is counted by the machine
        return self._next(length)

    def readline(self) -> bytes:
        """The rest of a line; of a line without an end, a piece, which `pickletools` refuses."""
        length, piece = 64, b""
        while b"\n" not in piece and len(piece) < min(length, len(self.data) - self.position):
            piece = bytes(self.data[self.position : self.position + length])
            length = min(4 * length, self._LONGEST_LINE)
        return self._next(piece.find(b"\n") + 1 or len(piece))

    def _next(self, length: int) -> bytes:
        piece = bytes(self.data[self.position : self.position + length])
        self.position += length
        return piece

    def tell(self) -> int:
        return self.position


class _Machine:
    """The pickle machine: its stack, the marks in it, and its memo."""

    def __init__(self, harmless: Container[str], where: str, memory: MemoryLimit) -> None:
        self.harmless = harmless
        self.where = where
        self.memory = memory
        self.imports: set[str] = set()
        self.references: list[Persistent] = []
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []
        self.far: dict[int, object] = {}  # places of the memo that do not follow the one before

    def run(self, stream: io.BytesIO | _Stream) -> None:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # it only reads and tells
            action = _ACTIONS.get(opcode.name)
            if action is None:
                self.refuse(f"its pickle uses the instruction {opcode.name}, which no torch file needs")
            is_small = type(argument) is int and -5 <= argument <= 256  # of which Python has one each
            kept = sys.getsizeof(argument) if action is _Machine.push and not is_small else 0
            self.memory.take(_COSTS.get(opcode.name, _STACK_NBYTES) + kept)
            action(self, argument)

    def refuse(self, what: str) -> NoReturn:
        raise UnsafeError(
            what,
            where=self.where,
            remedy="If you trust its source: load it with torch.load(path, weights_only=False), save the model's "
            "state_dict() with torch.save, and use that file.",
        )

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise LookupError("it takes more from its stack than there is")
        self.memory.give(_STACK_NBYTES)
        return self.stack.pop()

    def pop_node(self) -> Node:
        value = self.pop()
        if not isinstance(value, Node):
            raise TypeError("it takes a plain value for a container")
        return value

    def pop_to_mark(self) -> list[object]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        self.memory.give(_MARK_NBYTES + (_STACK_NBYTES - _PLACE_NBYTES) * len(values))
        return values

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def duplicate(self, _: object) -> None:
        self.push(self.stack[-1])

    def remember(self, key: int) -> None:
        if key == len(self.memo):
            self.memo.append(self.stack[-1])
            self.far.pop(key, None)
        elif 0 <= key < len(self.memo):
            self.memo[key] = self.stack[-1]
        else:
            self.memory.take(_FAR_NBYTES)
            self.far[key] = self.stack[-1]

    def remember_next(self, _: object) -> None:
        self.remember(len(self.memo) + len(self.far))

    def recall(self, key: int) -> None:
        self.push(self.memo[key] if 0 <= key < len(self.memo) else self.far[key])

    def dict_from_mark(self, _: object) -> None:
        pairs = self.pairs_from_mark()
        self.push(Node(kind="dict"))
        self.add_pairs(pairs)

    def append(self, _: object) -> None:
        value = self.pop()
        self.add_values([value])

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.memory.take(_PAIR_NBYTES)
        self.add_pairs([(key, value)])

    def pairs_from_mark(self) -> list[tuple[object, object]]:
        values = self.pop_to_mark()
        self.memory.take(_PAIR_NBYTES * (len(values) // 2))
        one = iter(values)
        return list(zip(one, one, strict=True))

    def add_values(self, values: list[object]) -> None:
        node = self.top()
        node.values = _longer(node.values, values)

    def add_pairs(self, pairs: list[tuple[object, object]]) -> None:
        node = self.top()
        node.pairs = _longer(node.pairs, pairs)

    def top(self) -> Node:
        self.memory.take(_STACK_NBYTES)
        node = self.pop_node()
        self.push(node)
        return node

    def name(self, argument: str) -> None:
        module, _, attribute = argument.partition(" ")
        self.push(self.named(module, attribute))

    def name_from_stack(self, _: object) -> None:
        attribute, module = self.pop(), self.pop()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise TypeError("it takes something else for a name")
        self.push(self.named(module, attribute))

    def named(self, module: str, attribute: str) -> Name:
        self.memory.take(_NAME_NBYTES + sys.getsizeof(module) + sys.getsizeof(attribute))
        path = f"{module}.{attribute}"
        if path not in self.harmless and len(self.imports) < _MOST_IMPORTS:
            self.imports.add(_shown(path))
        return Name(path)

    def call(self, _: object) -> None:
        arguments = self.pop_node()
        self.push(Node(self.callee(self.pop()), arguments.values))

    def call_with_keywords(self, _: object) -> None:
        keywords, arguments = self.pop_node(), self.pop_node()
        self.push(Node(self.callee(self.pop()), arguments.values, pairs=keywords.pairs))

    def call_from_mark(self, _: object) -> None:
        callee, *arguments = self.pop_to_mark()
        self.push(Node(self.callee(callee), arguments))

    def call_named_from_mark(self, argument: str) -> None:
        arguments = self.pop_to_mark()
        module, _, attribute = argument.partition(" ")
        self.push(Node(self.named(module, attribute), arguments))

    def callee(self, value: object) -> Name | Node:
        # Before torch 1.6, a class came with its source code, as a reference to something outside.
        if isinstance(value, Persistent):
            value = next((part for part in value.fields if isinstance(part, Name)), None)
        if not isinstance(value, Name | Node):
            raise TypeError("it calls a plain value")
        return value

    def set_state(self, _: object) -> None:
        state = self.pop()
        node = self.top()
        node.states = _longer(node.states, [state])

    def persistent(self, _: object) -> None:
        reference = Persistent(self.pop_node().values)
        self.references.append(reference)
        self.push(reference)

    def nothing(self, _: object) -> None:
        pass


def _longer(known: Sequence[Any], more: list[Any]) -> list[Any]:
    """Append to a node's list in place; most nodes have only an empty tuple, which `more` replaces."""
    if not isinstance(known, list):
        return [*known, *more] if known else more
    known += more
    return known


def _tuple_of(length: int) -> Callable[[_Machine, object], None]:
    def action(machine: _Machine, _: object) -> None:
        machine.push(Node(values=tuple([machine.pop() for _ in range(length)][::-1]), kind="tuple"))

    return action


def _container(kind: str, *, from_mark: bool = False) -> Callable[[_Machine, object], None]:
    return lambda machine, _: machine.push(Node(values=machine.pop_to_mark() if from_mark else (), kind=kind))


def _constant(value: object) -> Callable[[_Machine, object], None]:
    return lambda machine, _: machine.push(value)


# What each instruction does. Missing on purpose: the extension registry (EXT1, EXT2, EXT4), which names code by
# number, persistent identifiers as text (PERSID) and buffers out of band (NEXT_BUFFER, READONLY_BUFFER).
_ACTIONS: Final[dict[str, Callable[[_Machine, Any], object]]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine.nothing),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        ),
        _Machine.push,
    ),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    **{f"EMPTY_{kind.upper()}": _container(kind) for kind in ("list", "set", "dict")},
    **{name: _tuple_of(n) for n, name in enumerate(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"))},
    **{kind.upper(): _container(kind, from_mark=True) for kind in ("tuple", "list", "frozenset")},
    "DICT": _Machine.dict_from_mark,
    "APPEND": _Machine.append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.add_values(machine.pop_to_mark())),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.add_pairs(machine.pairs_from_mark()),
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": _Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": _Machine.remember_next,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "OBJ": _Machine.call_from_mark,
    "INST": _Machine.call_named_from_mark,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.persistent,
}

# The bytes of memory that an instruction takes, in addition to what it pushes as it is; others a place on the stack.
_NODES: Final = ("EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "EMPTY_TUPLE", "REDUCE", "NEWOBJ", "NEWOBJ_EX")
_FULL: Final = ("TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "LIST", "FROZENSET", "DICT", "OBJ", "INST")
_COSTS: Final[dict[str, int]] = {
    "MARK": _MARK_NBYTES,
    **dict.fromkeys(_NODES, _NODE_NBYTES),
    **dict.fromkeys(_FULL, _NODE_NBYTES + _LIST_NBYTES),
    **dict.fromkeys(("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "BUILD"), _LIST_NBYTES),
    "BINPERSID": 2 * _STACK_NBYTES + 40,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _MEMO_NBYTES),
}
