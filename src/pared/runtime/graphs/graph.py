"""A graph that runs in place of a model's modules, for calls of one kind."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from pared.errors import ModelError, reason_of
from pared.model.tensors import version_of
from pared.runtime.graphs.call_kinds import Bound
from pared.runtime.graphs.capturing.capture import Captured, Size
from pared.runtime.graphs.capturing.kept import Checks
from pared.runtime.graphs.draft import Draft
from pared.runtime.graphs.fusion import fuse, hides_nan, simplify
from pared.runtime.graphs.products import place, share, take_apart
from pared.runtime.graphs.shorter import heads, norms, nothing, rotation
from pared.runtime.kernels.activation import NotFiniteError

_MOST_KNOWN: Final = 1000  # tensors that are known to be finite


class Graph:
    """A model's call as operators, with int8 products fused with their neighbours.

    It refers to the model's tensors and packed weights; only folded norms and outliers have weights of their own.

    Args:
        model: the quantized model, whose weights and kernels it takes.
        captured: a call of a float model of the same architecture; it is not changed.

    Attributes:
        note: that of the capture.
        checks: the calls for which it is known to be right.

    Raises:
        ModelError: the graph cannot be made.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.note, self.checks = captured.note, Checks()
        self._sizes = tuple(captured.inputs.values())
        self._outputs = captured.outputs
        self._finite = FiniteInputs()
        try:
            self.module = compiled(captured, model)
            self._hides = any(hides_nan(node) for node in self.module.graph.nodes)
        except Exception as error:  # a rule that fails costs the graph, not the user's call; tests make graphs by hand
            raise ModelError(
                f"its graph cannot be made ({reason_of(error)})",
                where="graph",
                remedy="The model runs by its modules instead. Please report this.",
            ) from error

    def fits(self, bound: Bound) -> bool:
        """Whether the graph was captured for inputs of these sizes, and none is empty."""
        return fits(self._sizes, bound)

    def __call__(self, bound: Bound) -> Any:
        """The model's output.

        Raises:
            NotFiniteError: NaN or Inf, which the modules answer in floats.
        """
        if self._hides:
            self._finite.check(bound)
        tensors = [value for value in bound.values() if type(value) is Tensor]
        return self._outputs.of(self.module.forward(*tensors), bound)


class FiniteInputs:
    """Looks for NaN and Inf in the inputs of calls; several threads may use it at once.

    What caches and outputs of encoders hold comes again with each step of decoding: a tensor in these is looked at once
    while nothing is written to it. Other inputs may be memory that somebody fills without torch's knowledge.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def check(self, bound: Mapping[str, Any]) -> None:
        """Raises NotFiniteError for a call that only modules answer as float32 does."""
        for name, value in bound.items():
            if type(value) is not Tensor or not value.is_floating_point():
                continue
            is_held = "." in name and not value.is_inference()  # of these, torch counts no writes
            seen = self._known.get(id(value)) if is_held else None
            if seen is not None and seen[0]() is value and seen[1] == version_of(value):
                continue
            if not torch.linalg.vector_norm(value).isfinite():
                raise NotFiniteError
            if is_held:
                if len(self._known) >= _MOST_KNOWN:
                    self._known = {}
                self._known[id(value)] = weakref.ref(value), version_of(value)


def fits(sizes: Iterable[tuple[Size, ...]], bound: Bound) -> bool:
    """Whether the tensors of a call have sizes that a capture allows."""
    known: dict[str, int] = {}
    tensors = [value for value in bound.values() if type(value) is Tensor]
    for tensor, own in zip(tensors, sizes, strict=True):
        for whole, size in zip(tensor.shape, own, strict=True):
            given = whole - size.more
            if not size.allows(given) or (size.symbol and known.setdefault(size.symbol, given) != given):
                return False
    return True


def compiled(captured: Captured, model: nn.Module) -> fx.GraphModule:
    """The operators as a module that takes the call's tensors, with int8 products instead of float ones."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(captured.graph, copies)
    graph.output(output)
    draft = Draft(graph)
    by_name = {str(old.name): new for old, new in copies.items()}
    for name, constant in captured.constants.items():
        placeholder = by_name[name]
        with graph.inserting_before(placeholder):
            placeholder.replace_all_uses_with(draft.value(constant))
        graph.erase_node(placeholder)
    simplify(draft)
    nothing.drop(draft)
    for joined in (norms, rotation, heads):
        joined.join(draft)
    nothing.share(draft)
    place(draft, model, {by_name[name]: tensor for name, tensor in captured.tensors.items()})
    take_apart(draft)
    share(draft)
    fuse(draft)
    _keep_layout(draft)
    draft.tidy()
    return _module(draft)


def _keep_layout(draft: Draft) -> None:
    """Return contiguous outputs where the modules do: users may call `view` on them."""
    (output,) = (node for node in draft.graph.nodes if node.op == "output")
    found = []
    for one in output.args[0]:
        value = one.meta.get("val") if isinstance(one, fx.Node) else None
        if isinstance(value, Tensor) and value.is_contiguous():
            copied = torch.ops.aten.clone if _is_part(one) else torch.ops.aten.contiguous
            one = draft.before(output, copied.default, one, memory_format=torch.contiguous_format)
        found.append(one)
    output.args = (found,)


def _is_part(node: Any) -> bool:
    """Whether a node is a view of a merged product: users may write to outputs, and keep them."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is operator.getitem:
            return True
        if not isinstance(node.target, torch._ops.OpOverload) or not (
            node.target.is_view or node.target is torch.ops.aten.reshape.default
        ):
            return False
        node = node.args[0]
    return False


def _module(draft: Draft) -> fx.GraphModule:
    # Values are plain attributes: a module cannot register packed weights.
    module = fx.GraphModule(_Values(draft.values), draft.graph)
    module.__dict__.update(draft.values)
    return module


class _Values(nn.Module):
    """Holds the values of a graph while it is made into a module."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(values)
