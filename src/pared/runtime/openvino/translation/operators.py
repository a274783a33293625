"""A captured graph translated by OpenVINO's own front end, which knows fewer operators than PyTorch has.

The front end is asked which operators it does not know, and torch takes these apart, one at a time. This takes a tenth
of the time of decomposing the whole program, and leaves what the front end knows as a whole, such as attention, whole.
"""

from __future__ import annotations

import operator
import sys
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pared.errors import ModelError
from pared.runtime.openvino.translation.recurrent import put_back, taken_out

_ROUNDS: Final = 4  # what an operator is taken apart into may have to be taken apart, too
_UNKNOWN: Final = "PtFrameworkNode"  # the front end's type of an operator that it does not know

# They check what the graph's guards have checked already.
_CHECKS: Final = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
)

_SPLITS: Final = (torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default)


def translated(graph: fx.Graph) -> Any:
    """The `openvino.Model` of a graph of aten operators, which is changed on the way.

    Its parameters have the names of the graph's placeholders, and the name of an operator is that of its node in the
    graph, a slash, and more.

    Raises:
        ModelError: there are operators that cannot be translated.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    for node in reversed(graph.nodes):
        if node.target in _CHECKS and not node.users:
            graph.erase_node(node)
        elif node.target is torch.ops.aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])  # which models have many of, and each takes long to take apart
            graph.erase_node(node)
        elif node.target in _SPLITS and node.op == "call_function":
            _give_sizes(node)
        elif node.target is torch.ops.aten.slice.Tensor and not node.kwargs and _is_whole(*node.args):
            node.replace_all_uses_with(node.args[0])  # between a cache and attention it would hide one from the other
            graph.erase_node(node)
    outputs = len(next(node for node in graph.nodes if node.op == "output").args[0])
    layers = taken_out(graph)
    front_end = FrontEndManager().load_by_framework("pytorch")
    left: list[str] = []
    known: dict[object, fx.Graph] = {}
    for _ in range(_ROUNDS):
        module = fx.GraphModule(torch.nn.Module(), graph)
        decoder = TorchFXPythonDecoder(module, None, dynamic_shapes=True)
        model = front_end.convert_partially(front_end.load(decoder))
        names = {op.get_friendly_name().split("/")[0] for op in model.get_ops() if op.get_type_name() == _UNKNOWN}
        if not names:
            decoder = TorchFXPythonDecoder(module, None, dynamic_shapes=True)  # which has to live until the end
            made = front_end.convert(front_end.load(decoder))
            put_back(made, layers, outputs)
            return _folded(made)
        unknown = [node for node in graph.nodes if node.name in names and node.op == "call_function"]
        left = [str(node.target) for node in unknown]
        taken_apart = [_take_apart(graph, node, known) for node in unknown]
        if not any(taken_apart):
            break
    what = ", ".join(sorted(set(left))[:3]) or "an operator"
    raise ModelError(f"OpenVINO does not know {what}", where="graph", remedy="Nothing needs to be done.")


def _give_sizes(node: fx.Node) -> None:
    """Let a split of a dimension of a known size be one into parts of given sizes, which is all the front end knows."""
    source: Any = node.args[0]
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)  # its third argument
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(type(size) is int for size in sizes):
        node.target, node.args, node.kwargs = torch.ops.aten.split_with_sizes.default, (source, sizes, dim), {}


def _is_whole(_: object, __: int = 0, start: object = None, end: object = None, step: object = 1) -> bool:
    """Whether a slice is all of a dimension."""
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


def _folded(model: Any) -> Any:
    """The same model, in which what is constant is computed, such as sizes of paddings; weights are parameters yet."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    return model


def _take_apart(graph: fx.Graph, node: fx.Node, known: dict[object, fx.Graph]) -> bool:
    """Replace a node by the operators that torch computes it with; False if it has none but itself.

    Args:
        graph: is changed.
        node: one of its nodes.
        known: what earlier nodes were taken apart into: layers of a model are alike, and tracing takes long. It grows.
    """
    given, structure = tree_flatten((node.args, node.kwargs))
    values = [one.meta.get("val") if isinstance(one, fx.Node) else one for one in given]
    places = [i for i, one in enumerate(given) if isinstance(one, fx.Node)]
    mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    if mode is None:
        return False

    def run(*tensors: Any) -> Any:
        now = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            now[place] = tensor
        args, kwargs = tree_unflatten(now, structure)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an operator of torch

    key = node.target, str(structure), tuple(map(_described, values)), tuple(places)
    if key not in known:
        known[key] = make_fx(run, tracing_mode="real")(*(values[place] for place in places)).graph
    parts = known[key]
    if [one.target for one in parts.nodes if one.op == "call_function"] == [node.target]:
        return False
    result: Any = next(one for one in parts.nodes if one.op == "output").args[0]
    several = not isinstance(result, fx.Node)
    if several and any(user.target is not operator.getitem for user in node.users):
        return False
    copies = dict(zip((one for one in parts.nodes if one.op == "placeholder"), (given[i] for i in places), strict=True))
    with graph.inserting_before(node):
        for part in parts.nodes:
            if part.op not in ("placeholder", "output"):
                copies[part] = graph.node_copy(part, copies.__getitem__)
                copies[part].meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    for user in list(node.users) if several else ():
        user.replace_all_uses_with(copies[result[user.args[1]]])
        graph.erase_node(user)
    if not several:
        node.replace_all_uses_with(copies[result])
    graph.erase_node(node)
    return True


def _described(value: object) -> object:
    """What tracing depends on: of tensors all but their numbers, with sizes as the symbols that stand for them."""
    if isinstance(value, Tensor):
        return value.dtype, str(tuple(value.shape)), str(tuple(value.stride())), value.device
    return type(value), str(value)
