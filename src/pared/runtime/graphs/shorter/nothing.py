"""Drop operators that give their input, and those that give what another one gives already."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import fx

from pared.runtime.graphs.attention import as_floats
from pared.runtime.graphs.draft import Draft, given_to, type_of
from pared.runtime.graphs.shorter.rotation import signed

_ATEN: Final = torch.ops.aten
# Operators that give a view, or memory that nothing writes to.
_SHARED: Final = (
    _ATEN.sym_size.int,
    _ATEN.slice.Tensor,
    _ATEN.unsqueeze.default,
    _ATEN.expand.default,
    as_floats,
    signed,
)


def drop(draft: Draft) -> None:
    """Drop casts to a tensor's own type, whole slices, factors of 1 and whole numbers plus 0."""
    for node in draft.calls(*_NOTHING):
        (x, *rest) = given_to(node)
        unchanged = isinstance(x, fx.Node) and type_of(x) is not None and type_of(x) is type_of(node)
        if unchanged and not node.kwargs and _NOTHING[node.target](*rest) and not _is_output(node):
            node.replace_all_uses_with(x)
            draft.graph.erase_node(node)


def share(draft: Draft) -> None:
    """Let all who need the same view of a tensor, or the same made of it, have one."""
    known: dict[object, fx.Node] = {}
    for node in draft.calls(*_SHARED):
        if _is_output(node):
            continue  # users may write to outputs
        key = (node.target, _hashable(given_to(node)), _hashable(tuple(sorted(node.kwargs.items()))))
        if key in known:
            draft.replace(node, known[key])
        else:
            known[key] = node


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _hashable(value: Any) -> Any:
    """With the type of numbers: 1, 1.0 and True are not the same argument."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return type(value), value


def _is_cast(_to: object, *more: object) -> bool:
    """Whether it is a cast of types or devices, without a copy that is asked for; all tensors are on the CPU."""
    return not any(more[1:]) and (not more or isinstance(more[0], (torch.dtype, bool)))


_NOTHING: Final[dict[Any, Any]] = {
    _ATEN.to.dtype: _is_cast,
    _ATEN.to.device: _is_cast,
    _ATEN.mul.Tensor: lambda by: isinstance(by, (int, float)) and by == 1,
    _ATEN.add.Tensor: lambda to: type(to) is int and to == 0,
    _ATEN.slice.Tensor: lambda _dim=0, start=None, end=None, step=1: (
        not isinstance(start, fx.Node) and not start and (end is None or end == sys.maxsize) and step == 1
    ),
}
