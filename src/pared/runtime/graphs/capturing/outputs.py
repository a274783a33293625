"""How what a graph returns becomes the output of a call, and the new content of the caches that the call was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pared.runtime.graphs.call_kinds import Argument, Bound
from pared.runtime.graphs.containers import Container, Layout, container_of, is_cache, layout_from

Leaf = Any  # of an output: a tensor or a constant, a `Kept` or a `Made`


@dataclass(frozen=True)
class Kept:
    """A leaf that is the cache which the call was given under this name."""

    name: str


@dataclass(frozen=True)
class Made:
    """A leaf that is a cache which the call makes; its tensors follow."""

    layout: Layout


@dataclass(frozen=True)
class Given:
    """A tensor that is the argument of this name itself."""

    name: str


@dataclass(frozen=True, eq=False)
class Outputs:
    """The structure of a call's output.

    Args:
        structure: what `tree_flatten` says of the output, with caches as leaves.
        leaves: the output's leaves, where a `Kept` or a `Made` stands for a cache, and None for anything else.
        caches: the layouts of the given caches after the call, by name.
        given: what the graph need not return, as it is an argument of the call, by place among all that the call gives.
    """

    structure: TreeSpec
    leaves: tuple[Kept | Made | None, ...]
    caches: Mapping[str, Layout]
    given: Mapping[int, Given]

    def of(self, results: Sequence[Any], bound: Bound) -> Any:
        """The output for what a graph returned; the caches of the call are written to."""
        rest = iter(results)
        total = len(results) + len(self.given)
        every = iter([bound[self.given[i].name] if i in self.given else next(rest) for i in range(total)])
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, Kept):
                leaves.append(bound[leaf.name].held)
            elif isinstance(leaf, Made):
                leaves.append(leaf.layout.made([next(every) for _ in leaf.layout.names]))
            else:
                leaves.append(next(every))
        for name, layout in self.caches.items():
            layout.put(bound[name].held, [next(every) for _ in layout.names])
        return tree_unflatten(leaves, self.structure)


class Arguments:
    """Makes a call's arguments out of an example's, and the flat output of a model; for one capture.

    Args:
        arguments: an example call.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        layouts = {one.name: layout_from(one.holds) for one in arguments if one.holds}
        self._layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        self._caches: dict[str, Any] = {}
        self._found: Outputs | None = None

    def prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the model takes them."""
        kwargs, self._caches = dict(kwargs), {}
        for name, layout in self._layouts.items():
            kwargs[name] = layout.made([kwargs.pop(f"{name}.{inner}") for inner in layout.names])
            if layout.halves:
                self._caches[name] = kwargs[name]
        return args, kwargs

    def returned(self, output: Any) -> list[Any]:
        """All that a call gives: the leaves of its output, and the tensors of its caches.

        Raises:
            TypeError: a cache became something that is not known.
        """
        found, structure = tree_flatten(output, is_leaf=is_cache)
        names = {id(cache): name for name, cache in self._caches.items()}
        marks: list[Kept | Made | None] = []
        flat: list[Any] = []
        for leaf in found:
            if id(leaf) in names:
                marks.append(Kept(names[id(leaf)]))
            elif is_cache(leaf):
                made = _contents(leaf)
                marks.append(Made(made.layout))
                flat += made.tensors.values()
            else:
                marks.append(None)
                flat.append(leaf)
        after = {name: _contents(cache) for name, cache in self._caches.items()}
        flat += [tensor for one in after.values() for tensor in one.tensors.values()]
        self._found = Outputs(structure, tuple(marks), {name: one.layout for name, one in after.items()}, {})
        return flat

    def outputs(self, graph: fx.Graph, inputs: Mapping[str, str]) -> Outputs:
        """The structure of the last output; what is an input of the graph is returned by it no more.

        Args:
            graph: whose output is changed.
            inputs: the arguments' names, by placeholder.
        """
        assert self._found is not None  # the model was called
        (output,) = (node for node in graph.nodes if node.op == "output")
        (leaves,) = output.args
        given = {
            i: Given(inputs[leaf.name])
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, fx.Node) and leaf.name in inputs
        }
        output.args = ([leaf for i, leaf in enumerate(leaves) if i not in given],)
        found = self._found
        return Outputs(found.structure, found.leaves, found.caches, given)


def _contents(cache: Any) -> Container:
    found = container_of(cache)
    if found is None or not all(isinstance(one, Tensor) for one in found.tensors.values()):
        raise TypeError(f"what a {type(cache).__name__} holds is not known")
    return found
