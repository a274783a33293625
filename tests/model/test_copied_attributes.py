"""What models hold and cannot be copied: it is shared, or new in the copy, or an error that names it."""

import functools
import io
import itertools
import logging
import queue
import sqlite3
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import ModelError
from pared.model.copies import shadow
from tests.model.entangled import State, X, build, give, holding, numbers, with_graph


class Stubborn:
    """Refuses to be copied."""

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("a handle of the device")


class Selfish:
    """Is copied as itself."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@pytest.mark.parametrize(
    "make",
    [
        lambda: (with_graph(), with_graph()),
        lambda: [with_graph()],
        lambda: {"h": {"c": with_graph()}},
        lambda: State(with_graph(), threading.Lock()),
        lambda: types.SimpleNamespace(h=with_graph()),
        lambda: nn.utils.rnn.pack_sequence([with_graph()]),
        lambda: torch.distributions.Normal(with_graph(), 1.0).loc,
    ],
)
def test_what_has_a_graph_loses_it_in_the_copy(make: Callable[[], Any]) -> None:
    model = holding(make())
    copied = shadow(model)
    assert torch.equal(copied(X), model(X))
    found = str(copied[0].held)
    assert "2." in found
    assert "grad_fn" not in found
    assert "grad_fn" in str(model[0].held)


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        threading.RLock,
        threading.Condition,
        threading.Event,
        threading.Semaphore,
        queue.Queue,
        threading.local,
    ],
)
def test_locks_are_new(make: Callable[[], Any]) -> None:
    model = holding(make())
    copied = shadow(model)[0].held
    assert type(copied) is type(model[0].held)
    assert copied is not model[0].held


def traced(function: Any, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, x)


@pytest.mark.parametrize(
    "make",
    [
        io.BytesIO,
        lambda: Path(__file__).open(),  # noqa: SIM115  # closed below
        lambda: sqlite3.connect(":memory:"),
        lambda: logging.getLogger("a.b"),
        lambda: logging.Logger("of nobody"),
        lambda: np,
        lambda: torch.cuda,
        lambda: threading.Thread(target=print),
        lambda: memoryview(b"abc"),
        lambda: traced(F.relu, torch.ones(1)),
        torch.Generator,
        Stubborn,
        queue.SimpleQueue,
        lambda: lambda x: x,
    ],
)
def test_handles_are_shared(make: Callable[[], Any]) -> None:
    model = holding({"handles": [make()]})
    copied = shadow(model)[0].held["handles"][0]
    assert type(copied) is type(model[0].held["handles"][0])
    getattr(copied, "close", int)()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (numbers, "0.held: is or holds a generator, which cannot be copied"),
        (lambda: Stubborn(torch.ones(2)), "Stubborn, which cannot be copied (RuntimeError: a handle of the device)"),
        (lambda: {"a": [Stubborn(build())]}, "Stubborn, which cannot be copied"),
    ],
)
def test_what_cannot_be_copied_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ModelError, match="0.held: is or holds a") as error:
        shadow(holding(make()))
    assert words in str(error.value)
    assert "Set the attribute to None" in error.value.remedy


LEADING: dict[str, Callable[[nn.Sequential], object]] = {
    "layer": lambda model: model[0],
    "model": lambda model: model,
    "weight": lambda model: model[0].weight,
    "memory of a weight": lambda model: model[0].weight.detach().view(-1),
    "weak": lambda model: weakref.ref(model[0]),
    "weak proxy, deep inside": lambda model: [{"a": (weakref.proxy(model),)}],
    "closure": lambda model: lambda x: model[0](x),
    "method": lambda model: model[0].forward,
    "partial": lambda model: functools.partial(model.forward),
}


@pytest.mark.parametrize("what", LEADING)
def test_a_copy_that_leads_back_to_the_model_is_refused(what: str) -> None:
    model = build()
    give(model[2], "held", Selfish(LEADING[what](model)))
    with pytest.raises(ModelError, match="2.held: leads back to the model that was copied"):
        shadow(model)


def test_a_class_that_has_the_model_in_its_closure_is_refused() -> None:
    model = build()

    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return F.relu(model[0](x))

    model[2].__class__ = Wrapped
    with pytest.raises(ModelError, match="2.forward: is a method of the class that has the model itself in its clos"):
        shadow(model)


def test_an_array_in_the_memory_of_a_weight_is_refused() -> None:
    model = build()
    give(model[0], "array", model[0].weight.detach().numpy()[1:])
    with pytest.raises(ModelError, match="0.array: is an array in the memory of a weight"):
        shadow(model)


def test_an_array_that_reaches_into_a_weight_from_before_or_backwards_is_refused() -> None:
    numbers = np.ones(20, np.float32)
    for array in (numbers, numbers[12::-1], numbers.reshape(4, 5).T):
        model = build()
        model[0].bias = nn.Parameter(torch.from_numpy(numbers[8:16]))
        give(model[0], "array", array)
        with pytest.raises(ModelError, match="0.array: is an array in the memory of a weight"):
            shadow(model)


def test_arrays_beside_the_memory_of_weights_are_copied() -> None:
    numbers = np.arange(20, dtype=np.float32)
    model = build()
    model[0].bias = nn.Parameter(torch.from_numpy(numbers[8:16].copy()))
    give(model[0], "arrays", [numbers[:8], numbers[16:], numbers[8:8], np.array(["a", None], object)])
    arrays: Any = shadow(model)[0].arrays
    assert [array.tolist() for array in arrays] == [[*range(8)], [16, 17, 18, 19], [], ["a", None]]
    assert not np.shares_memory(arrays[0], numbers)


def test_a_traced_forward_is_refused() -> None:
    model = build()
    weight = model[0].weight.detach()
    give(model[0], "forward", traced(lambda x: x @ weight.T, X))
    with pytest.raises(ModelError, match="0.forward: is a traced function that holds weights as constants"):
        shadow(model)


def nested(depth: int) -> nn.Module:
    inner: nn.Module = nn.Linear(1, 1, bias=False)
    for _ in range(depth):
        inner = nn.Sequential(inner)
    return inner


def test_modules_may_nest_as_deep_as_torch_walks_through_them() -> None:
    model = nested(300)
    copied = shadow(model)
    (ours,), (theirs,) = model.parameters(), copied.parameters()
    assert ours is not theirs
    assert torch.equal(ours, theirs)
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in model.named_modules()]


def test_modules_may_refer_to_each_other_in_a_long_chain() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(2000)))
    for one, following in itertools.pairwise(model):
        give(one, "following", [following])
    copied = shadow(model)
    assert all(one.following[0] is following for one, following in itertools.pairwise(copied))


def test_a_chain_that_is_too_long_is_an_error() -> None:
    model = build()
    chain: list[object] = [model[0]]
    for _ in range(2000):
        chain = [chain]
    give(model, "chain", chain)
    with pytest.raises(ModelError, match="in a chain that is too long to be copied"):
        shadow(model)


def test_a_partial_that_holds_itself_is_copied() -> None:
    model = build()
    box: dict[str, Any] = {}
    box["partial"] = functools.partial(model[0].forward, box)
    box["partial"].note = [model[2].weight]
    give(model[0], "held", box)
    copied = shadow(model)
    held = copied[0].held["partial"]
    assert held.args[0] is copied[0].held
    assert held.func.__self__ is copied[0]
    assert held.note[0] is copied[2].weight
