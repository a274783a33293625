"""A graph under construction: operators, and the values that they refer to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx

# What can be written in the code of a graph; everything else is referred to.
_WRITTEN: Final = (fx.Node, bool, int, float, str, type(None), tuple, list, torch.dtype)


class Draft:
    """A graph and its values, the `get_attr` nodes: tensors, packed weights, counterparts."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.values: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def value(self, held: object) -> fx.Node:
        """A new node that gives a value, at the place where nodes are inserted."""
        name = self._names.setdefault(id(held), f"value_{len(self._names)}")
        self.values[name] = held  # which keeps it alive, so that its id stays unique
        node = self.graph.get_attr(name)
        if isinstance(held, Tensor):
            node.meta["val"] = held
        return node

    def holds(self, *nodes: object) -> bool:
        """Whether all of these are values or None, and nothing is computed."""
        return all(node is None or (isinstance(node, fx.Node) and node.op == "get_attr") for node in nodes)

    def held(self, node: Any) -> Any:
        """The value of a node for which `holds` is true; None for None."""
        return None if node is None else self.values[str(node.target)]

    def calls(self, *targets: object) -> Iterator[fx.Node]:
        """The nodes that call one of these, in order; the graph may be changed meanwhile."""
        yield from [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def before(self, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in front of another; arguments that cannot be written in code become values."""
        with self.graph.inserting_before(node):
            return self.graph.call_function(target, tuple(self._given(one) for one in args), kwargs)

    def _given(self, argument: Any) -> Any:
        return argument if isinstance(argument, _WRITTEN) else self.value(argument)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replace a node by another, which inherits what is known of its output."""
        new.meta = {**old.meta, **new.meta}
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def tidy(self) -> None:
        """Drop unused nodes and values."""
        self.graph.eliminate_dead_code()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.values = {name: held for name, held in self.values.items() if name in used}


def given_to(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node: other nodes, and constants in the graph's code."""
    return node.args


def is_call(node: Any, target: object) -> bool:
    """Whether a node calls this operator or function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses another."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def type_of(node: object) -> torch.dtype | None:
    """The type of a node's tensor; None if its output is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def rank_of(node: object) -> int:
    """The number of dimensions of a node's tensor; -1 if its output is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else -1
