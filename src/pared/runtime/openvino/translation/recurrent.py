"""Recurrent layers, which OpenVINO has but its front end does not know in a captured graph.

Each is taken out of the graph before it is translated: what it reads becomes further outputs of the graph, and what it
gives further inputs. In the translated graph a sequence of OpenVINO for each layer joins the two.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

_aten: Final = torch.ops.aten


@dataclass(frozen=True)
class _Kind:
    """An operator of PyTorch.

    Args:
        states: how many states it has.
        gates: OpenVINO's gates by their places in PyTorch's weights.
        sequence: OpenVINO's operator, by its name.
        options: what it is given besides.
    """

    states: int
    gates: tuple[int, ...]
    sequence: str
    options: Mapping[str, object]


# PyTorch's gates of an LSTM are input, forget, cell and output; of a GRU reset, update and new.
_KINDS: Final[Mapping[object, _Kind]] = {
    _aten.lstm.input: _Kind(2, (1, 0, 2, 3), "lstm_sequence", {}),
    _aten.gru.input: _Kind(1, (1, 0, 2), "gru_sequence", {"linear_before_reset": True}),
    _aten.rnn_tanh.input: _Kind(1, (0,), "rnn_sequence", {"activations": ["tanh"]}),
    _aten.rnn_relu.input: _Kind(1, (0,), "rnn_sequence", {"activations": ["relu"]}),
}
_NAMES: Final = ("output", "hidden", "cell")
_KEPT_APART: Final = "gru_sequence"  # whose bias of the new gate's state is not added to that of its input


@dataclass(frozen=True)
class Recurrent:
    """What was taken out of a graph.

    Args:
        kind: which operator it was.
        given: where in the graph's outputs its input, its first states and its weights are.
        made: the names of the graph's inputs that its output and its last states are by now; None for one that nobody
            reads.
        hidden: the size of a state.
        layers: the number of layers.
        has_biases: whether the weights of each direction are followed by two biases.
        both: whether there are two directions.
        batch_first: whether its input is (batch, steps, inputs), and not (steps, batch, inputs).
    """

    kind: _Kind
    given: tuple[int, ...]
    made: tuple[str | None, ...]
    hidden: int
    layers: int
    has_biases: bool
    both: bool
    batch_first: bool


def taken_out(graph: fx.Graph) -> list[Recurrent]:
    """Take all recurrent layers out of a graph whose output is a list of different nodes."""
    found = []
    (end,) = (node for node in graph.nodes if node.op == "output")
    for node in [node for node in graph.nodes if node.target in _KINDS]:
        kind = _KINDS[node.target]
        data, states, weights, has_biases, layers, _, training, both, batch_first = node.args
        states = list(states) if kind.states > 1 else [states]
        ways = layers * (1 + both)
        plain = len(weights) == ways * (4 if has_biases else 2)  # else an LSTM projects its states
        if training or not plain or any(user.target is not operator.getitem for user in node.users):
            continue
        made: list[str | None] = [None] * (1 + kind.states)
        first = next(iter(graph.nodes))
        for user in list(node.users):
            if not user.users:  # the front end takes a first input that nobody reads for something else
                graph.erase_node(user)
                continue
            with graph.inserting_before(first):
                place = graph.placeholder(f"{node.name}_{_NAMES[user.args[1]]}")
            place.meta.update(user.meta)
            made[user.args[1]] = place.name
            user.replace_all_uses_with(place)
            graph.erase_node(user)
        graph.erase_node(node)
        outputs: list[Any] = list(dict.fromkeys([*end.args[0], data, *states, *weights]))  # it takes no output twice
        places = tuple(outputs.index(one) for one in (data, *states, *weights))
        end.args = (outputs,)
        hidden = int(states[0].meta["val"].shape[-1])
        found.append(Recurrent(kind, places, tuple(made), hidden, layers, has_biases, both, batch_first))
    return found


def put_back(model: Any, layers: Sequence[Recurrent], outputs: int) -> None:
    """Join what was taken out to a translated graph.

    Args:
        model: an `openvino.Model`, which is changed.
        layers: what was taken out.
        outputs: how many outputs the graph had before.
    """
    parameters = {one.get_friendly_name(): one for one in model.get_parameters()}
    results = list(model.get_results())
    for one in layers:
        sources = [results[place].input_value(0) for place in one.given]
        for name, value in zip(one.made, _sequences(one, sources), strict=True):
            if name is not None:
                for target in list(parameters[name].output(0).get_target_inputs()):
                    target.replace_source_output(value)
                model.remove_parameter(parameters[name])
    for result in results[outputs:]:
        model.remove_result(result)
    model.validate_nodes_and_infer_types()


def _sequences(one: Recurrent, sources: Sequence[Any]) -> list[Any]:
    """The output and the last states."""
    from openvino import opset13 as ops

    x, states, weights = sources[0], sources[1 : 1 + one.kind.states], sources[1 + one.kind.states :]
    x = x if one.batch_first else _moved(x, (1, 0, 2))
    ways, each = 1 + one.both, 4 if one.has_biases else 2
    batch, steps = (ops.gather(ops.shape_of(x), ops.constant(at), ops.constant(0)) for at in (0, 1))
    lengths = ops.broadcast(steps, ops.unsqueeze(batch, ops.constant(0)))
    firsts = [ops.split(state, ops.constant(0), one.layers).outputs() for state in states]
    ends: list[list[Any]] = [[] for _ in states]
    for layer in range(one.layers):
        own = [weights[each * at : each * (at + 1)] for at in range(layer * ways, (layer + 1) * ways)]
        w, r = (_joined([_reordered(parts[which], one.kind.gates) for parts in own]) for which in (0, 1))
        b = _joined([_bias(one, parts) for parts in own])
        first = [_moved(state[layer], (1, 0, 2)) for state in firsts]  # OpenVINO's have the batch first
        made = getattr(ops, one.kind.sequence)(
            x, *first, lengths, w, r, b, one.hidden, "bidirectional" if one.both else "forward", **one.kind.options
        ).outputs()
        # (batch, directions, steps, hidden) to (batch, steps, directions * hidden)
        moved = _moved(made[0], (0, 2, 1, 3))
        x = ops.reshape(moved, ops.constant([0, 0, ways * one.hidden]), special_zero=True).output(0)
        for own_ends, state in zip(ends, made[1:], strict=True):
            own_ends.append(_moved(state, (1, 0, 2)))
    out = x if one.batch_first else _moved(x, (1, 0, 2))
    return [out, *(ops.concat(parts, 0).output(0) for parts in ends)]


def _moved(value: Any, order: Sequence[int]) -> Any:
    from openvino import opset13 as ops

    return ops.transpose(value, ops.constant(list(order))).output(0)


def _joined(parts: Sequence[Any]) -> Any:
    """Those of the directions, along a dimension of their own."""
    from openvino import opset13 as ops

    return ops.concat([ops.unsqueeze(part, ops.constant(0)) for part in parts], 0)


def _reordered(value: Any, gates: Sequence[int]) -> Any:
    from openvino import opset13 as ops

    if len(gates) == 1:
        return value
    parts = ops.split(value, ops.constant(0), len(gates)).outputs()
    return ops.concat([parts[gate] for gate in gates], 0)


def _bias(one: Recurrent, parts: Sequence[Any]) -> Any:
    from openvino import opset13 as ops

    apart = one.kind.sequence == _KEPT_APART
    if not one.has_biases:
        size = one.hidden * (len(one.kind.gates) + apart)
        return ops.broadcast(ops.convert_like(ops.constant(0.0), parts[0]), ops.constant([size]))
    added = _reordered(ops.add(parts[2], parts[3]), one.kind.gates)
    if not apart:
        return added
    update, reset, _ = ops.split(added, ops.constant(0), 3).outputs()
    new = [ops.split(part, ops.constant(0), 3).output(2) for part in parts[2:]]
    return ops.concat([update, reset, *new], 0)
