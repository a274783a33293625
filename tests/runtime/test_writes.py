"""Operators that write to their inputs: the graph gives what the model gives, and most need no second trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.errors import ModelError
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import Captured, capture
from pared.runtime.graphs.graph import Graph


def joined(x: Tensor) -> Tensor:
    y = x + 1
    y += x
    y.mul_(2).relu_()
    return y


def parts(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[0, 2] = 3.0
    y[..., ::2] += 1
    return y * 2


def seen_through_views(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    flat, turned, first = y.reshape(-1), y.transpose(0, 1), y[0]
    before = flat.sum()
    y.add_(1)
    first.neg_()
    return flat, turned, first, before, y


def a_copy_keeps_the_old(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    old = y.clone()
    y[1:].fill_(5)
    return old, y


def types_stay(x: Tensor) -> Tensor:
    y = (x * 3).to(torch.float16)
    y += x
    count = torch.ones(x.shape, dtype=torch.int64)
    count.copy_(x)
    return y.float() + count


def states_of_steps(x: Tensor) -> Tensor:
    out, state = torch.zeros_like(x), torch.zeros_like(x[:, 0])
    for step in range(4):
        state = state * 0.5 + x[:, step]
        out[:, step] = state
    return out


def masked(x: Tensor) -> Tensor:
    y = x + 0.5
    y.masked_fill_(y > 1, 0.0)
    y[y < 0] = -1.0
    y.index_add_(0, torch.tensor([1, 0]), x[:2])
    return y


def through_other_shapes(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 4)
    y.view(-1, 2, 2)[:, 0] = x[:, :2]
    y.unsqueeze(1)[:, 0, 3].neg_()
    y.flatten()[1:3].fill_(2)
    return y


def pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    left, right = y.chunk(2, dim=1)
    y.clamp_(min=0)
    return left, right


def shared_by_a_dropout(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = nn.functional.dropout(y, 0.5, False)
    first = z[0]
    z += 1
    first.neg_()
    return y, nn.functional.dropout(z, 0.0, True).mul_(2)


def many_in_a_row(x: Tensor) -> Tensor:
    y = x * 2
    for _ in range(100):
        y = y.add_(1).mul_(0.9)
    return y


def nothing_is_written(x: Tensor) -> Tensor:
    y = nn.functional.dropout(x, 0.5, False, inplace=True)
    return y.detach_() + 1


KNOWN: dict[str, Callable[[Tensor], object]] = {
    one.__name__: one
    for one in (
        joined,
        parts,
        seen_through_views,
        a_copy_keeps_the_old,
        types_stay,
        states_of_steps,
        masked,
        through_other_shapes,
        pieces,
        shared_by_a_dropout,
        many_in_a_row,
        nothing_is_written,
    )
}


def into_a_turned_view(x: Tensor) -> Tensor:
    y = x * 2
    y.transpose(0, 1)[1:] += 1
    return y


def into_a_piece(x: Tensor) -> Tensor:
    y = x * 2
    y.chunk(2, dim=1)[0].relu_()
    return y


def other_shapes_of_the_same(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    row, turned = y[0], (x + 1).unsqueeze(0)
    inner = turned[0]
    y.unsqueeze_(0).add_(1)
    turned.squeeze_(0)
    turned[0] += 1
    return row, y, inner, turned.t_()


def into_a_piece_of_what_a_dropout_gives(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    nn.functional.dropout(y, 0.5, False).t().mul_(3)
    return y, y + x


OTHERS: dict[str, Callable[[Tensor], object]] = {
    one.__name__: one
    for one in (into_a_turned_view, into_a_piece, other_shapes_of_the_same, into_a_piece_of_what_a_dropout_gives)
}


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def captured(function: Callable[[Tensor], object], x: Tensor) -> Captured:
    model = Model(function).eval()
    bound = bind(parameters_of(model), (x,), {})
    assert bound is not None
    return capture(model, arguments_of(bound))


def check(function: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    graph = Graph(Model(function), captured(function, torch.randn(6, 4)))
    for rows in (6, 9):
        x = torch.randn(rows, 4)
        bound = bind(["x"], (x.clone(),), {})
        assert bound is not None
        torch.testing.assert_close(graph(bound), function(x.clone()))


@pytest.mark.parametrize("name", KNOWN)
def test_known_writes_need_no_second_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    check(KNOWN[name])


@pytest.mark.parametrize("name", OTHERS)
def test_other_writes_are_traced_again(name: str) -> None:
    check(OTHERS[name])


@pytest.mark.parametrize("name", KNOWN | OTHERS)
def test_no_operator_of_the_graph_writes(name: str) -> None:
    nodes = captured((KNOWN | OTHERS)[name], torch.randn(6, 4)).graph.nodes
    targets = [node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    allowed = {torch.ops.aten.dropout_.default, torch.ops.aten.detach_.default}
    assert targets
    assert not [one for one in targets if one._schema.is_mutable and one not in allowed]


class Writing(nn.Module):
    """Its forward writes to what it was given, or to what it keeps.

    Args:
        write: gets the module, and the input.
    """

    def __init__(self, write: Callable[[Writing, Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(4))
        self.kept = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return x * self.weight * self.count + self.kept


REFUSED: dict[str, Callable[[Any, Tensor], object]] = {
    "its input": lambda _, x: x.add_(1),
    "a view of its input": lambda _, x: x.view(-1)[1:].mul_(2),
    "its input, through a dropout": lambda _, x: nn.functional.dropout(x, 0.5, False).mul_(2),
    "its input, through a copy that is none": lambda _, x: x.contiguous().to(torch.float32).relu_(),
    "a buffer": lambda m, _: m.count.add_(1),
    "a buffer, through a type": lambda m, _: m.count.float()[0].fill_(1),
    "a parameter": lambda m, _: m.weight.detach().clamp_(0, 0.5),
    "running statistics": lambda m, x: nn.functional.batch_norm(x, m.count, m.count + 1, training=True),
    "a tensor that it keeps": lambda m, _: m.kept.add_(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_outlives_the_call_is_never_written_to(name: str) -> None:
    model = Writing(REFUSED[name]).eval().requires_grad_(False)
    bound = bind(["x"], (torch.randn(6, 4),), {})
    assert bound is not None
    with pytest.raises(ModelError, match=r"changes buffers or inputs|is mutated"):
        capture(model, arguments_of(bound))
