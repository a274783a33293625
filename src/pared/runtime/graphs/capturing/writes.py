"""Operators that write to one of their inputs, replaced by operators that give new tensors.

`ExportedProgram.run_decompositions` does this for every graph, by tracing it twice more, which takes longer than the
export before it. Most writes need no tracing: an operator such as `relu_` has a twin that gives a new tensor, and
whatever shares memory with the tensor that was written to is computed again from the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

_ATEN: Final = torch.ops.aten

# How a part of a tensor is put back: by an operator on the tensor, the part, and what the part was taken with.
_PUT_BACK: Final = {_ATEN.select.int: _ATEN.select_scatter.default, _ATEN.slice.Tensor: _ATEN.slice_scatter.default}

# What gives the same numbers in the same order, in another shape.
_RESHAPED: Final = (
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
)

# What only looks like a tensor of its own, or like a write.
_SAME: Final = (_ATEN.detach.default, _ATEN.detach_.default, _ATEN.alias.default)
_DROPOUT: Final = _ATEN.dropout.default  # an export takes what it gives for new memory


def replace_writes(graph: fx.Graph) -> bool:
    """Replace the operators of an exported graph that write to their inputs, in place.

    Args:
        graph: as `torch.export.export` makes it; each node has its value in `meta["val"]`, and values that share
            memory share a storage.

    Returns:
        whether none is left. If one writes in a way that is not known here, or to what the graph is given, none is
        replaced.
    """
    writes = [node for node in graph.nodes if _is_write(node)]
    if not writes:
        return True
    found = _Writes(graph)
    if all(found.is_known(node) for node in writes):
        found.replace()
        graph.lint()
        return True
    _drop_dropouts(graph)
    return False


def _drop_dropouts(graph: fx.Graph) -> None:
    """Use the input of a dropout that gives its input, so that another trace sees that what is written to is one."""
    for node in list(graph.nodes):
        if node.target is _DROPOUT and _is_same(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not _is_same(node)


def _is_same(node: fx.Node) -> bool:
    # A dropout that does not train, or drops nothing, gives its input.
    if node.target in (_DROPOUT, _ATEN.dropout_.default):
        return bool(node.args[1] == 0 or node.args[2] is False)
    return node.target in _SAME


def _twin(target: Any) -> Any:
    """The operator that gives what another one writes into its first argument; None if there is none.

    An operator such as `squeeze_` writes no numbers: it gives a tensor another shape.
    """
    writes = [one.name for one in target._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if writes != [target._schema.arguments[0].name] or not name.endswith("_") or torch.Tag.inplace_view in target.tags:
        return None
    return getattr(getattr(_ATEN, name.removesuffix("_"), None), overload, None)


def _storage(value: object) -> int | None:
    """What identifies the memory of a value; None if it has none, or several."""
    if isinstance(value, Tensor):
        return int(value.untyped_storage()._cdata)
    parts = {_storage(one) for one in value} if isinstance(value, list | tuple) else set()
    return parts.pop() if len(parts) == 1 else None


def _storages(graph: fx.Graph) -> dict[fx.Node, int | None]:
    """What identifies the memory of each node's value."""
    found: dict[fx.Node, int | None] = {}
    same: dict[int, int | None] = {}  # what is thought to be new memory, and is not
    for node in graph.nodes:
        storage = _storage(node.meta.get("val"))
        if storage is not None and node.target is _DROPOUT and _is_same(node):
            same[storage] = found[node.args[0]]
        found[node] = storage if storage is None else same.get(storage, storage)
    return found


class _Writes:
    """Which nodes of a graph share memory, and what became of that memory so far."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._storages = _storages(graph)
        self._roots: dict[int, fx.Node] = {}
        self._parents: dict[fx.Node, fx.Node | None] = {}  # of which a node gives a part, or another view
        for node, storage in self._storages.items():
            if storage is not None and self._roots.setdefault(storage, node) is not node:
                shared = [one for one in node.all_input_nodes if self._storages[one] == storage]
                parent = shared[0] if len(shared) == 1 or _is_write(node) else None
                while parent in self._parents and self._is_whole(parent):  # else many writes in a row are a deep tree
                    parent = self._parents[parent]
                self._parents[node] = parent
        self._versions: dict[int, int] = {}  # how often each storage was written to
        self._newest: dict[fx.Node, tuple[int, fx.Node]] = {}  # the version, and the node that has that value

    def is_known(self, write: fx.Node) -> bool:
        """Whether a write can be replaced."""
        node: Any = write.args[0] if write.args else None
        storage = self._storages.get(node)
        if storage is None or _twin(write.target) is None or self._roots[storage].op != "call_function":
            return False
        if any(self._parents[one] is None for one in self._parents if self._storages[one] == storage):
            return False
        while node is not self._roots[storage]:
            if not self._is_whole(node) and node.target not in (*_PUT_BACK, *_RESHAPED):
                return False
            node = self._parents[node]
        return True

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a node gives all of its parent, unchanged in form."""
        return _is_write(node) or _is_same(node)

    def replace(self) -> None:
        """Replace all writes."""
        shared = list(self._parents)
        for node in list(self._graph.nodes):
            with self._graph.inserting_before(node):
                if _is_write(node):
                    self._write(node)
                elif self._storages[node] not in self._versions:  # others are made again where they are used
                    node.args, node.kwargs = self._current_of(node.args), self._current_of(node.kwargs)
        for node in reversed(shared):
            if not node.users:
                self._graph.erase_node(node)

    def _current_of(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self._current)

    def _current(self, node: fx.Node) -> fx.Node:
        """The node that has the value which a node of the original graph has by now."""
        storage = self._storages[node]
        if storage is None or storage not in self._versions:
            return node
        version, newest = self._newest.get(node, (0, node))
        if version != self._versions[storage]:
            parent = self._parents[node]
            assert parent is not None  # a root is known in every version
            newest = self._current(parent) if self._is_whole(node) else self._graph.node_copy(node, self._current)
            self._newest[node] = self._versions[storage], newest
        return newest

    def _write(self, write: fx.Node) -> None:
        node: Any = write.args[0]
        storage = self._storages[node]
        assert storage is not None  # as `is_known` says
        value = self._computed(_twin(write.target), write)
        while node is not self._roots[storage]:
            parent: Any = self._parents[node]
            if node.target in _RESHAPED:
                value = self._graph.call_function(_ATEN.reshape_as.default, (value, self._current(parent)))
            elif not self._is_whole(node):
                args = (self._current(parent), value, *node.args[1:])
                value = self._graph.call_function(_PUT_BACK[node.target], args, node.kwargs)
            value.meta |= parent.meta
            node = parent
        self._versions[storage] = self._versions.get(storage, 0) + 1
        self._newest[node] = self._versions[storage], value

    def _computed(self, twin: Callable[..., Any], write: fx.Node) -> fx.Node:
        """What a write writes; it keeps the type of what it writes to, which the twin may not."""
        args, kwargs = self._current_of(write.args), self._current_of(write.kwargs)
        value = self._graph.call_function(twin, args, kwargs)
        value.meta |= write.meta
        wanted, leaves = write.meta["val"].dtype, fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        mode = detect_fake_mode(tree_leaves(leaves))
        assert mode is not None  # every exported value is fake
        with mode:
            value.meta["val"] = twin(*leaves[0], **leaves[1])
        if value.meta["val"].dtype != wanted:
            value = self._graph.call_function(_ATEN.to.dtype, (value, wanted))
            value.meta |= write.meta
        return value
