"""ONNX models: their graphs are searched for tensors, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pared.errors import UnsafeError
from pared.files.checks import Place
from pared.files.disk import File
from pared.readers.listing import Listing, Note
from pared.readers.onnx.protobuf import fields
from pared.readers.onnx.tensors import Tensors, outside_path, text_of

# Fields of the messages in onnx.proto, by number.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTION = 7, 20, 25
_TRAINING_GRAPHS: Final = (1, 2)
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NODE: Final = 7
_NODE_OUTPUT, _NODE_NAME, _NODE_ATTRIBUTE = 2, 3, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE: Final = 22
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2

_DEEPEST: Final = 32
# The keys of the fields that may follow a model's first field, its version.
_SECOND_KEYS: Final = b"\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca"


def is_onnx(file: File) -> bool:
    """Whether the file begins like an ONNX model: with its version, as all writers do."""
    head = bytes(file.data[:3])
    return len(head) == 3 and head[0] == 0x08 and 0 < head[1] < 0x80 and head[2] in _SECOND_KEYS


def read_onnx(file: File) -> Listing:
    """List the initializers of an ONNX model and the tensors in its nodes, including subgraphs and functions.

    Raises:
        FileError: a file with some of its tensors is missing.
        CorruptError: it contradicts itself, or names data outside its folder.
        UnsafeError: it is nested too deeply, or listing it would exceed the memory limit.
    """
    at = Place(file.where)
    tensors = Tensors(file, file.memory)
    graphs = 0
    for number, value in _messages(file.data, at):
        if number == _MODEL_GRAPH:
            graphs += 1
            if graphs > 1:
                at.fail("it holds two models, one after the other")
            _graph(value, tensors, 0)
        elif number == _MODEL_FUNCTION:
            _function(value, tensors)
        elif number == _MODEL_TRAINING:
            for inner, graph in _messages(value, at):
                if inner in _TRAINING_GRAPHS:
                    _graph(graph, tensors, 0)
    sizes = {location: outside_path(file, location, at).stat().st_size for location in tensors.outside}
    notes = {"(graph)": Note(len(file.data) - tensors.inside)}
    for location, spans in tensors.outside.items():
        rest = sizes[location] - _covered(spans, Place(f"{file.where}: {location}"))
        if rest:
            notes[f"({location})"] = Note(rest, "alignment, or bytes that no tensor refers to")
    return Listing(
        tuple(tensors.listed),
        tensors.storages,
        notes,
        nbytes=len(file.data) + sum(sizes.values()),
        kind="an ONNX model",
        beside=tuple(tensors.outside),
    )


def _covered(spans: set[tuple[int, int]], at: Place) -> int:
    """The total size of spans of (offset, length), which must not overlap."""
    end = 0
    for offset, length in sorted(spans):
        if length and offset < end:
            at.fail("the data of two tensors overlap")
        end = max(end, offset + length)
    return sum(length for _, length in spans)


def _messages(data: memoryview, at: Place) -> Iterator[tuple[int, memoryview]]:
    return ((number, value) for number, value in fields(data, at) if not isinstance(value, int))


def _graph(data: memoryview, tensors: Tensors, depth: int) -> None:
    where = tensors.file.where
    if depth > _DEEPEST:
        raise UnsafeError("its graphs are nested deeper than any model's", where=where, remedy="Do not use this file.")
    for number, value in _messages(data, Place(where)):
        if number == _GRAPH_NODE:
            _node(value, tensors, depth)
        elif number == _GRAPH_INITIALIZER:
            tensors.add(value, "")
        elif number == _GRAPH_SPARSE:
            _sparse(value, tensors, "")


def _function(data: memoryview, tensors: Tensors) -> None:
    for number, value in _messages(data, Place(tensors.file.where)):
        if number == _FUNCTION_NODE:
            _node(value, tensors, 0)


def _node(data: memoryview, tensors: Tensors, depth: int) -> None:
    """Tensors of a node have the name of its output, by which other nodes refer to them."""
    at = Place(tensors.file.where)
    output = name = ""
    for number, value in _messages(data, at):
        if number == _NODE_OUTPUT and not output:
            output = text_of(value, at)
        elif number == _NODE_NAME:
            name = text_of(value, at)
        elif number == _NODE_ATTRIBUTE:
            # Attributes follow the names in all writers' files: field numbers ascend.
            _attribute(value, tensors, output or name or "(node)", depth)


def _attribute(data: memoryview, tensors: Tensors, name: str, depth: int) -> None:
    for number, value in _messages(data, Place(tensors.file.where)):
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            tensors.add(value, name)
        elif number == _ATTRIBUTE_SPARSE:
            _sparse(value, tensors, name)
        elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            _graph(value, tensors, depth + 1)


def _sparse(data: memoryview, tensors: Tensors, name: str) -> None:
    for number, value in _messages(data, Place(tensors.file.where)):
        if number == _SPARSE_VALUES:
            tensors.add(value, name)
        elif number == _SPARSE_INDICES:
            tensors.add(value, f"{name}/indices" if name else "")
