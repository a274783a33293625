"""The headers of HDF5 objects, and the trees and heaps in which groups keep names; walked in place.

After the HDF5 File Format Specification, version 3.0. Every address is looked at once for what it is taken for, so that
no file is endless.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pared.files.checks import Place
from pared.files.memory_limit import Allowance

UNDEFINED: Final = (1 << 64) - 1
# The types of messages in an object's header.
DATASPACE, LINK_INFO, DATATYPE, LINK, LAYOUT, CONTINUATION, SYMBOL_TABLE = 0x01, 0x02, 0x03, 0x06, 0x08, 0x10, 0x11
_WANTED: Final = frozenset((DATASPACE, LINK_INFO, DATATYPE, LINK, LAYOUT, SYMBOL_TABLE))
_SHARED: Final = 0x02
_HARD: Final = 0
_LONGEST_NAME: Final = 4096
_MESSAGE_NBYTES: Final = 300
_NAME_NBYTES: Final = 250  # beside its characters, with what is made of it
_LEVELS: Final = 8  # of a tree; each has at least twice as many nodes as the one above it


@dataclass(frozen=True, slots=True)
class Message:
    """One message of an object's header: its type and where it is; shared ones are elsewhere in truth."""

    kind: int
    begin: int
    size: int
    shared: bool


class Bytes:
    """The bytes of a file, read at addresses that the file itself names.

    Args:
        data: of the file.
        at: for messages.
        allowance: the memory that reading may take.
    """

    def __init__(self, data: memoryview, at: Place, allowance: Allowance) -> None:
        self.data = data
        self.at = at
        self.allowance = allowance
        self._seen: set[tuple[str, int]] = set()

    def number(self, position: int, size: int) -> int:
        """A whole number, its lowest byte first."""
        return int.from_bytes(self.piece(position, size), "little")

    def piece(self, position: int, size: int) -> bytes:
        """Some bytes.

        Raises:
            CorruptError: they are not in the file.
        """
        if position + size > len(self.data):
            self.at.fail(f"it refers to byte {position + size:,}, and has {len(self.data):,}: it is truncated")
        return bytes(self.data[position : position + size])

    def expect(self, position: int, signature: bytes) -> None:
        """See that something begins as it should, and was not looked at before."""
        found = self.piece(position, len(signature))
        if found != signature:
            self.at.fail(f"at byte {position:,} it has no {signature.decode('ascii')}")
        self.once(signature.decode("ascii"), position)

    def once(self, what: str, position: int) -> None:
        """See that an address was not taken for the same before."""
        self.allowance.take(_MESSAGE_NBYTES)
        if (what, position) in self._seen:
            self.at.fail(f"it refers to byte {position:,} twice")
        self._seen.add((what, position))

    def name(self, position: int) -> str:
        """A text that ends with a zero."""
        found = bytes(self.data[position : position + _LONGEST_NAME])
        return self._decoded(found[: found.find(0)] if 0 in found else self.at.fail("a name in it has no end"))

    def text(self, position: int, size: int) -> str:
        """A text of known length."""
        if size > _LONGEST_NAME:
            self.at.fail("a name in it is longer than any")
        return self._decoded(self.piece(position, size))

    def _decoded(self, raw: bytes) -> str:
        self.allowance.take(_NAME_NBYTES + len(raw))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.at.fail("a name in it is no text")


def messages(source: Bytes, address: int) -> list[Message]:
    """The messages in the header of the object at an address, as far as they are known here."""
    source.once("header", address)
    if source.piece(address, 4) == b"OHDR":
        return list(_messages_2(source, address))
    if source.number(address, 1) != 1:
        source.at.fail(f"at byte {address:,} it has no object")
    return list(_messages_1(source, address))


def _messages_1(source: Bytes, address: int) -> Iterator[Message]:
    blocks = [(address + 16, source.number(address + 8, 4))]
    while blocks:
        position, size = blocks.pop()
        end = position + size
        while position + 8 <= end:
            kind, length, flags = (
                source.number(position, 2),
                source.number(position + 2, 2),
                source.number(position + 4, 1),
            )
            message = _message(source, kind, position + 8, length, flags)
            if kind == CONTINUATION:
                blocks.append(_continuation(source, message))
            if kind in _WANTED:
                yield message
            position += 8 + length


def _messages_2(source: Bytes, address: int) -> Iterator[Message]:
    flags = source.number(address + 5, 1)
    position = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    blocks = [(position + width, source.number(position, width))]
    head = 6 if flags & 0x04 else 4
    while blocks:
        position, size = blocks.pop()
        end = position + size
        while position + head <= end:
            kind, length, own = (
                source.number(position, 1),
                source.number(position + 1, 2),
                source.number(position + 3, 1),
            )
            message = _message(source, kind, position + head, length, own)
            if kind == CONTINUATION:
                begin, size = _continuation(source, message)
                source.expect(begin, b"OCHK")
                blocks.append((begin + 4, max(0, size - 8)))
            if kind in _WANTED:
                yield message
            position += head + length


def _message(source: Bytes, kind: int, begin: int, size: int, flags: int) -> Message:
    source.allowance.take(_MESSAGE_NBYTES)
    if begin + size > len(source.data):
        source.at.fail("an object's header reaches beyond its end: it is truncated")
    return Message(kind, begin, size, bool(flags & _SHARED))


def _continuation(source: Bytes, message: Message) -> tuple[int, int]:
    begin = source.number(message.begin, 8)
    source.once("continuation", begin)
    return begin, source.number(message.begin + 8, 8)


def links(source: Bytes, found: list[Message]) -> Iterator[tuple[str, int]]:
    """The names in a group, and the addresses of what they name; links to other paths and files are left out."""
    for message in found:
        if message.kind == SYMBOL_TABLE:
            yield from _old_links(source, source.number(message.begin, 8), source.number(message.begin + 8, 8))
        elif message.kind == LINK:
            yield from _link(source, message.begin)
        elif message.kind == LINK_INFO:
            yield from _dense_links(source, message.begin)


def _old_links(source: Bytes, tree: int, heap: int) -> Iterator[tuple[str, int]]:
    source.expect(heap, b"HEAP")
    names = source.number(heap + 24, 8)
    for place in tree_leaves(source, tree, 8):
        node = source.number(place, 8)
        source.expect(node, b"SNOD")
        for i in range(source.number(node + 6, 2)):
            entry = node + 8 + 40 * i
            if source.number(entry + 16, 4) != 2:  # 2: a link to another path
                yield source.name(names + source.number(entry, 8)), source.number(entry + 8, 8)


def tree_leaves(source: Bytes, root: int, key: int) -> Iterator[int]:
    """Where the lowest nodes of a tree of version 1 have the addresses of what is in it; each behind its key.

    Args:
        source: the file.
        root: the address of its highest node.
        key: the bytes of a key.
    """
    waiting = [(root, _LEVELS)]
    while waiting:
        node, above = waiting.pop()
        source.expect(node, b"TREE")
        level = source.number(node + 5, 1)
        if level >= above:
            source.at.fail(f"the tree at byte {root:,} is none")
        count, step = source.number(node + 6, 2), 8 + key
        begin = node + 24 + key
        source.piece(begin, max(0, count * step - key))  # all of them are in the file
        places = range(begin, begin + count * step, step)
        if level:
            waiting += [(source.number(place, 8), level) for place in reversed(places)]
        else:
            yield from places


def _link(source: Bytes, begin: int) -> Iterator[tuple[str, int]]:
    flags = source.number(begin + 1, 1)
    position = begin + 2
    kind = _HARD
    if flags & 0x08:
        kind = source.number(position, 1)
        position += 1
    position += (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    length = source.number(position, width)
    name = source.text(position + width, length)
    if kind == _HARD:
        yield name, source.number(position + width + length, 8)


def _dense_links(source: Bytes, begin: int) -> Iterator[tuple[str, int]]:
    """Many links: in a heap, found by a tree of version 2."""
    position = begin + 2 + (8 if source.number(begin + 1, 1) & 1 else 0)
    heap, tree = source.number(position, 8), source.number(position + 8, 8)
    if heap == UNDEFINED:
        return
    blocks = _Heap(source, heap)
    for record in _records(source, tree):
        yield from _link(source, blocks.place(record + 4))  # behind the hash of the name


def _records(source: Bytes, tree: int) -> Iterator[int]:
    """Where the records of a tree of version 2 are."""
    source.expect(tree, b"BTHD")
    node_size, size, depth = source.number(tree + 6, 4), source.number(tree + 10, 2), source.number(tree + 12, 2)
    root, count = source.number(tree + 16, 8), source.number(tree + 24, 2)
    if depth > _LEVELS or not size:
        source.at.fail(f"the tree at byte {tree:,} is none")
    widths = _count_widths(node_size, size, depth)
    waiting = [(root, count, depth)] if root != UNDEFINED else []
    while waiting:
        node, count, level = waiting.pop()
        source.expect(node, b"BTIN" if level else b"BTLF")
        yield from (node + 6 + size * i for i in range(count))
        position = node + 6 + size * count
        for _ in range(count + 1 if level else 0):
            waiting.append((source.number(position, 8), source.number(position + 8, widths[level - 1][0]), level - 1))
            position += 8 + widths[level - 1][0] + (widths[level - 1][1] if level > 1 else 0)


def _count_widths(node_size: int, size: int, depth: int) -> list[tuple[int, int]]:
    """By level: the bytes of a count of records in one node, and in all nodes below it."""
    most = total = max(0, node_size - 10) // size
    widths = [(_width(most), _width(total))]
    for _ in range(depth):
        pointer = 8 + widths[0][0] + (widths[-1][1] if len(widths) > 1 else 0)
        most = max(0, node_size - 10 - pointer) // (size + pointer)
        total = (most + 1) * total + most
        widths.append((_width(most), _width(total)))
    return [(widths[0][0] if level == 0 else w[0], w[1]) for level, w in enumerate(widths)]


def _width(value: int) -> int:
    return max(1, -(-value.bit_length() // 8))


class _Heap:
    """A fractal heap: objects at offsets in a space that blocks of growing size make up."""

    def __init__(self, source: Bytes, address: int) -> None:
        source.expect(address, b"FRHP")
        self.source = source
        if source.number(address + 7, 2):
            source.at.fail("a heap in it is compressed")
        self.width = source.number(address + 110, 2)
        self.first, self.largest = source.number(address + 112, 8), source.number(address + 120, 8)
        self.offset_width = -(-source.number(address + 128, 2) // 8)
        self.length_width = _width(min(self.largest, source.number(address + 10, 4)))
        root, rows = source.number(address + 132, 8), source.number(address + 140, 2)
        self.blocks = list(self._direct(root, rows))
        self.begins = [begin for begin, _, _ in self.blocks]

    def _direct(self, root: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """Where each direct block begins in the heap's space, its size, and its address."""
        if not rows:
            yield 0, self.first, root
            return
        self.source.expect(root, b"FHIB")
        position, begin = root + 13 + self.offset_width, 0
        for row in range(rows):
            size = self.first << max(0, row - 1)
            if size > self.largest or row > 64:
                self.source.at.fail("a heap in it is larger than any group needs")
            for _ in range(self.width):
                self.source.allowance.take(_MESSAGE_NBYTES)
                address = self.source.number(position, 8)
                if address != UNDEFINED:
                    yield begin, size, address
                begin, position = begin + size, position + 8

    def place(self, identifier: int) -> int:
        """Where the object is that an identifier names, which itself is at an address."""
        if self.source.number(identifier, 1) & 0x30:
            self.source.at.fail("a link in it is kept in an unusual way")
        offset = self.source.number(identifier + 1, self.offset_width)
        begin, size, address = self.blocks[max(0, bisect(self.begins, offset) - 1)] if self.blocks else (0, 0, 0)
        if not begin <= offset < begin + size:
            self.source.at.fail("a link in it is not where it should be")
        return address + offset - begin
