"""A graph that reads what a cache holds, and gives what it holds with more joined to it, as one that keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pared.runtime.onnx.engines import OpenVinoSession

ORDER: Final = "order_of_texts"
"""The name of an input of such a graph: int32 (texts,), which of the texts it holds each is."""

_ANY: Final = -1  # as OpenVINO writes a size that may vary


@dataclass(frozen=True)
class Inside:
    """Which numbers a graph keeps.

    Args:
        names: the inputs that it does not take any more; keys or values, each (texts, heads, tokens, features).
        places: for each result of the graph as it was, its place among the results that are left and these.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stateful:
    """A copy of a graph that keeps the tensors of caches as its own state.

    Args:
        model: an `openvino.Model`, without results for what it keeps.
        inside: which numbers it keeps; the places of these come last.
        new: what each call joins to them, (texts, heads, new tokens, features).
    """

    model: Any
    inside: Inside
    new: tuple[Any, ...]


def kept_inside(graph: Any, sizes: Mapping[str, Sequence[int]]) -> tuple[Any, Inside] | None:
    """A copy of an `openvino.Model` that keeps the tensors of caches as its own state.

    Its last result is what was joined to them, float32 (tensors, texts, heads, new tokens, features).

    Args:
        graph: a captured call.
        sizes: the sizes of each input, by its name; -1 where a size may vary.

    Returns:
        None if it has no such inputs, or not all of them are of one shape.
    """
    import openvino

    found = stateful(graph, sizes, ORDER)
    if found is None or len({tuple(sizes[name])[1::2] for name in found.inside.names}) > 1:
        return None
    ops = openvino.opset13
    new = ops.concat([ops.unsqueeze(one, ops.constant(np.int64(0))) for one in found.new], 0)
    found.model.add_results([ops.result(new)])
    found.model.validate_nodes_and_infer_types()
    return found.model, found.inside


def stateful(graph: Any, sizes: Mapping[str, Sequence[int]], order: str) -> Stateful | None:
    """A copy of an `openvino.Model` that keeps the tensors of caches as its own state, and gives none of them.

    Args:
        graph: a captured call.
        sizes: as for `kept_inside`.
        order: the name of the input that says which of the texts it holds each is, int32 (texts,).

    Returns:
        None if it has no such inputs, or their heads or features vary.
    """
    import openvino

    ops, model = openvino.opset13, graph.clone()
    model.reshape({port: openvino.PartialShape(list(sizes[port.get_any_name()])) for port in model.inputs})
    results = model.get_results()
    places = [place for place, result in enumerate(results) if _past(result) is not None]
    joins = [results[place].input_value(0).get_node() for place in places]
    pasts = [_past(results[place]) for place in places]
    names = tuple(past.output(0).get_any_name() for past in pasts)
    if not pasts or None in map(_fixed, pasts) or len(set(names)) < len(names):
        return None
    texts = ops.parameter([_ANY], openvino.Type.i32, name=order)
    texts.output(0).set_names({order})
    model.add_parameters([texts])
    for place, past, join, name in zip(places, pasts, joins, names, strict=True):
        heads, features = _fixed(past)
        # Nothing at first: a state has to begin somehow.
        shape = ops.concat([ops.shape_of(texts, "i64"), ops.constant(np.array([heads, 0, features], np.int64))], 0)
        nothing = ops.broadcast(ops.constant(np.float32(0)), shape)
        readers = list(past.output(0).get_target_inputs())
        state = openvino.op.util.VariableInfo()
        state.variable_id, state.data_type = name, openvino.Type.f32
        state.data_shape = openvino.PartialShape([_ANY, heads, _ANY, features])
        variable = openvino.op.util.Variable(state)
        model.add_variables([variable])
        held = openvino.op.read_value(nothing, variable)
        # The runtime joins attention with its state where texts may be put into another order before.
        ordered = ops.gather(held, texts, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
        model.remove_result(results[place])
        model.remove_parameter(past)
        model.add_sinks([openvino.op.assign(join, variable)])
    model.validate_nodes_and_infer_types()
    left = [place for place in range(len(results)) if place not in places]
    inside = Inside(names, tuple(map([*left, *places].index, range(len(results)))))
    return Stateful(model, inside, tuple(join.input_value(1) for join in joins))


def is_joined(session: OpenVinoSession, inside: Inside) -> bool:
    """Whether attention works on the state where it is; else each call would copy all that is kept."""
    kinds = session.kinds()
    return 2 * kinds.count("ScaledDotProductAttention") == len(inside.names)


def _past(result: Any) -> Any:
    """The parameter to whose end something is joined; None if a result is anything else."""
    join = result.input_value(0).get_node()
    if join.get_type_name() != "Concat" or join.get_input_size() != 2 or join.get_output_partial_shape(0).rank != 4:
        return None
    past = join.input_value(0).get_node()
    is_end = join.get_attributes()["axis"] in (-2, 2) and past.get_type_name() == "Parameter"
    return past if is_end and past.get_element_type().get_type_name() == "f32" else None


def _fixed(numbers: Any) -> Any:
    """The heads and the features of keys or values; None where these vary."""
    shape = numbers.get_partial_shape()
    heads, features = shape[1], shape[3]
    return (heads.get_length(), features.get_length()) if heads.is_static and features.is_static else None
