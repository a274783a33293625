"""Calls as they were made: copies of arguments of any type, and what calls change in a model."""

import random
import threading
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.model import calls
from pared.model.calls import Call
from pared.model.recorded import draws, values

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    x: Tensor
    names: list[str]


class Slotted:
    __slots__ = ("unset", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Graph:
    """As the batches of libraries for graph networks."""

    def __init__(self) -> None:
        self.stores = {"nodes": OrderedDict(x=torch.ones(3)), "edges": [np.ones(2), (torch.ones(1), None)]}
        self.lock = threading.Lock()  # which Python cannot copy
        self.itself = self


def packed() -> Any:
    return nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])


MAKERS: dict[str, Callable[[], Any]] = {
    "tensors in lists and dicts": lambda: {"a": [torch.ones(2), {"b": torch.ones(3)}]},
    "namedtuple": lambda: Pair(torch.ones(2), [torch.ones(1)]),
    "dataclass": lambda: Batch(torch.ones(2), ["a"]),
    "slots": lambda: Slotted(torch.ones(2)),
    "UserDict": lambda: UserDict(x=torch.ones(2)),
    "deque": lambda: deque([torch.ones(2)], maxlen=3),
    "a graph's batch": Graph,
    "packed sequence": packed,
    "partial": lambda: partial(torch.add, torch.ones(2), alpha=2),
    "generator of random numbers": lambda: [torch.Generator().manual_seed(1), torch.ones(1)],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_copy_shares_no_tensor_and_is_equal(make: Callable[[], Any]) -> None:
    value = make()
    copy = values.copied(value)
    assert type(copy) is type(value)
    assert values.same(copy, value)
    for tensor in values.tensors_in(copy):
        tensor.add_(1)
    assert all(bool((tensor >= 0).all()) for tensor in values.tensors_in(value))
    assert values.same(value, make())
    assert not values.same(copy, value) or not [t for t in values.tensors_in(value) if t.is_floating_point()]


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["list"].append(1),
        lambda value: value.pop("n"),
        lambda value: value["array"].__setitem__(0, 5.0),
        lambda value: value["x"].data.mul_(2),
        lambda value: value["x"].requires_grad_(),
        lambda value: value["list"][0].names.append("b"),
        lambda value: value.update(n=True),
        lambda value: torch.rand(1, generator=value["draws"]),
    ],
)
def test_any_change_is_seen(change: Callable[[Any], Any]) -> None:
    value = {
        "x": torch.ones(2),
        "list": [Batch(torch.ones(1), ["a"])],
        "n": 1,
        "array": np.ones(3),
        "draws": torch.Generator().manual_seed(0),
    }
    before = values.copied(value)
    assert values.same(before, value)
    change(value)
    assert not values.same(before, value)


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("is never asked")

    __hash__ = None  # type: ignore[assignment]  # on purpose


@pytest.mark.parametrize(
    "other",
    [
        {"words": {"a": 1, "b": 2, "c": 2.0}, "rest": [None, float("nan")]},
        {"words": {"a": 1, "b": True, "c": 2.0}, "rest": [None, float("nan")]},
        {"words": {"b": 1, "a": 1, "c": 2.0}, "rest": [None, float("nan")]},
        {"words": {"a": 1, "b": 1, "c": 2.0}, "rest": (None, float("nan"))},
        {"words": {"a": 1, "b": 1, "c": 2.0}, "rest": [None, float("nan"), 0]},
        {"words": {"a": 1, "b": 1, "c": 2.0}, "rest": [None, torch.tensor(float("nan"))]},
    ],
)
def test_tables_of_plain_values_differ_in_one_of_them(other: Any) -> None:
    value = {"words": {"a": 1, "b": 1, "c": 2.0}, "rest": [None, float("nan")]}
    assert values.same(value, {"words": {"a": 1, "b": 1, "c": 2.0}, "rest": [None, float("nan")]})
    assert not values.same(value, other)
    assert not values.same(other, value)


def test_objects_are_not_asked_whether_they_are_equal() -> None:
    assert values.same([Unequal(), float("nan"), "a"], [Unequal(), float("nan"), "a"])
    assert not values.same([Unequal(), "a"], [Unequal(), "b"])
    assert values.same({1, "a", Unequal}, {"a", 1, Unequal})
    assert not values.same({1, 2}, {1, 3})
    assert not values.same([frozenset("ab")], [frozenset("abc")])
    assert not values.same(bytearray(b"a"), bytearray(b"b"))
    nan = torch.tensor([1.0, float("nan")])
    assert values.same(nan, nan.clone())


def test_views_of_one_memory_stay_views_of_one() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    copy = values.copied({"all": x, "part": x[:, 1], "far": torch.zeros(1000)[::999]})
    copy["all"][0, 1] = 50
    assert copy["part"].tolist() == [50.0, 4.0]
    assert x[0, 1] == 1


@pytest.mark.parametrize("numbers", [8, 9])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_views_of_other_types_stay_views_of_the_same_memory(start: int, numbers: int) -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))[start : start + numbers]
    given = [x, x.view(torch.int32)[2:], x.view(torch.int16)[::2], x.view(torch.uint8)]
    before = [one.clone() for one in given]
    copied = values.copied(given)
    assert [one.dtype for one in copied] == [one.dtype for one in given]
    assert all(map(torch.equal, copied, given))
    copied[0].fill_(1.0)
    assert all(map(torch.equal, given, before)), "the original stays"
    ones = torch.ones(numbers)
    expected = [ones, ones.view(torch.int32)[2:], ones.view(torch.int16)[::2], ones.view(torch.uint8)]
    assert all(map(torch.equal, copied, expected)), "what is written through one is read through all"


def test_parts_of_complex_numbers_stay_parts_of_them() -> None:
    z = torch.ones(4, dtype=torch.complex128)
    copied, real = values.copied((z, torch.view_as_real(z)[1:]))
    copied.zero_()
    assert not real.any()
    assert bool((z == 1).all())


def nested(depth: int) -> list[Any]:
    value: list[Any] = [torch.ones(1)]
    for _ in range(depth):
        value = [value, value]
    return value


def test_values_that_contain_the_same_value_many_times_over() -> None:
    value = nested(40)  # with 2 to the power of 40 ways to the tensor
    assert len(list(values.leaves(value))) == 1
    assert values.nbytes(value) == 4
    copied = values.copied(value)
    assert values.same(value, copied)
    values.tensors_in(copied)[0].zero_()
    assert not values.same(value, copied)


def test_values_are_the_same_however_often_one_of_them_is_used_again() -> None:
    part = [torch.ones(1)]
    assert values.same([part, part], [[torch.ones(1)], [torch.ones(1)]])
    assert not values.same([part, part], [[torch.ones(1)], [torch.zeros(1)]])
    one, other = [torch.ones(1)], [torch.ones(1)]
    for value in (one, other):
        value.append(value)
    assert values.same(one, other)


def test_a_copy_takes_no_more_than_the_part_that_is_passed() -> None:
    (copy,) = values.copied([torch.zeros(1 << 20)[:4]])
    assert copy.untyped_storage().nbytes() == 16


def test_modules_are_shared_and_gradients_stay_wanted() -> None:
    layer = nn.Linear(2, 2)
    x = torch.ones(2, requires_grad=True)
    copy: dict[str, Any] = values.copied({"model": layer, "x": x * 1, "leaf": x})
    assert copy["model"] is layer
    assert copy["x"].is_leaf
    assert copy["x"].requires_grad
    assert copy["leaf"] is not x


def test_random_numbers_are_drawn_alike_and_the_states_come_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(3)
    expected = float(torch.rand(()))
    torch.manual_seed(3)
    with draws.alike():
        first = drawn()
    with draws.alike():
        assert drawn() == first
    assert float(torch.rand(())) == expected


class Stateful(nn.Module):
    """Remembers in every way there is."""

    buffer: Tensor
    hidden: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.past = []  # type: ignore[assignment]  # any attribute; PyTorch's own modules have none that change
        self.register_buffer("buffer", torch.zeros(2))
        self.hidden, self.count, self.log = None, 0, {"seen": deque([0], maxlen=2)}
        self.unchanged = {"a": [1, 2]}
        self.weights = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x) if self.hidden is None else self.hidden
        self.hidden = h + x
        self.buffer += x.sum(0)
        self.count += 1
        self.log["seen"].append(self.count)
        self.extra = self.count
        out: Tensor = self.inner(x) + self.hidden + self.buffer + self.count + self.log["seen"][0]
        return out


def recorded(model: nn.Module, batches: Any, limit: int = 100) -> tuple[list[Call], list[Any]]:
    made: list[Call] = []
    outputs: list[Any] = []

    def listener(call: Call, output: Any) -> None:
        made.append(call)
        outputs.append(values.copied(output))

    calls.run(model, batches, limit, listener=listener)
    return made, outputs


def test_every_call_finds_the_state_it_found_when_it_was_made() -> None:
    model = Stateful()
    made, outputs = recorded(model, [torch.ones(2, 2) * i for i in range(4)])
    other = Stateful()
    other.load_state_dict({**model.state_dict(), "buffer": torch.zeros(2)})
    for order in ([3, 0, 2, 1, 1], [0, 1, 2, 3]):
        for i in order:
            with torch.no_grad():
                assert torch.equal(made[i].on(other), outputs[i])
    assert (other.hidden, other.count, other.buffer.tolist(), list(other.log["seen"])) == (None, 0, [0.0, 0.0], [0])
    assert not hasattr(other, "extra")
    assert made[0].state is not None
    assert set(made[0].state.changed) == {"hidden", "count", "log", "extra", "buffer"}
    assert made[0].side_effects.startswith("its forward changes ")


def test_what_no_call_changes_is_not_held() -> None:
    model = Stateful()
    model.large = torch.ones(1000)
    (call,), _ = recorded(model, [torch.ones(2, 2)])
    assert call.state is not None
    assert values.nbytes(dict(call.state._watch._first)) < 1000
    assert set(call.state._watch._first) == set(call.state._watch.changed)


def test_a_module_that_changes_nothing_has_no_state() -> None:
    (call,), _ = recorded(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), [torch.ones(3, 2)])
    assert call.state is not None
    assert call.state.changed == ()
    assert not call.writes


class Eats(nn.Module):
    """Uses up whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, states: list[Tensor], options: dict[str, Any]) -> Tensor:
        x -= 1
        states.append(x)
        out: Tensor = self.layer(states.pop(0)) * options.pop("scale")
        options["note"] = torch.zeros(1)
        return out


def test_what_is_recorded_is_what_was_passed_and_batches_stay_as_they_are() -> None:
    batch = {"x": torch.ones(2, 3), "states": [torch.ones(2, 3)], "options": {"scale": 2.0}}
    (call,), (output,) = recorded(Eats(), [batch])
    assert torch.equal(batch["x"], torch.ones(2, 3))
    assert len(batch["states"]) == 1
    assert batch["options"] == {"scale": 2.0}
    assert call.writes
    assert values.same(call.kwargs, batch)
    model = Eats()
    with torch.no_grad():
        one, two = call.on(model), call.on(model)
    assert torch.equal(one, two)
    assert values.same(call.kwargs, batch)
    assert output.shape == one.shape


def test_a_function_that_calls_the_model_sees_what_its_own_arguments_become() -> None:
    lengths = []

    def calibrate(model: nn.Module) -> None:
        states = [torch.ones(2, 3), torch.ones(2, 3)]
        for _ in range(3):
            model(torch.ones(2, 3), states, {"scale": 1.0})
            lengths.append(float(states[-1].sum()))

    made, _ = recorded(Eats(), calibrate)
    assert lengths == [0.0, 0.0, 0.0]
    assert [len(call.args[1]) for call in made] == [2, 2, 2]
    assert [float(call.args[1][0].sum()) for call in made] == [6.0, 6.0, 0.0]


def test_hooks_of_the_user_run_again_when_a_call_is_made_again() -> None:
    model = nn.Linear(1, 1)
    model.register_forward_pre_hook(lambda _, args: (args[0] * 10,))
    (call,), (output,) = recorded(model, [torch.ones(1, 1)])
    assert call.args[0] == 1
    with torch.no_grad():
        assert torch.equal(call.on(model), output)


def test_a_model_may_call_itself_and_raise() -> None:
    class Again(nn.Module):
        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            if depth < 0:
                raise ValueError("too deep")
            return x + self(x, depth - 1) if depth else x

    def calibrate(model: nn.Module) -> None:
        with pytest.raises(ValueError, match="too deep"):
            model(torch.zeros(1), -1)
        model(torch.ones(1))

    made, outputs = recorded(Again(), calibrate)
    assert [call.args[1:] for call in made] == [(0,), ()]
    assert [float(output) for output in outputs] == [1.0, 2.0]


def test_batches_come_from_generators_one_at_a_time() -> None:
    def batches() -> Iterator[Tensor]:
        for i in range(100):
            yield torch.full((2, 2), float(i))

    made, _ = recorded(nn.Identity(), batches(), limit=5)
    assert [float(call.args[0][0, 0]) for call in made] == [0.0, 1.0, 2.0]
