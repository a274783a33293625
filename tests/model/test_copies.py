"""Copies of models that are tied to themselves, or hold what cannot be copied: a copy is another model, or an error."""

import contextlib
import copy
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import ModelError
from pared.model.copies import clone_structure, shadow
from pared.model.copying.ties import check_globals
from pared.model.tensors import find_tensors


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: 0.5 * function(x)


class Remembering:
    """A decorator with a memory of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, x: Tensor) -> Any:
        self.calls += 1
        return self.function(x)


def memoized(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[bytes, Any] = {}

    def run(x: Tensor) -> Any:
        key = x.numpy().tobytes()
        if key not in known:
            known[key] = function(x)
        return known[key]

    return run


def recursive(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, again: bool = True) -> Any:
        return run(x, False) if again else function(x)

    return run


def by_default(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, *, inner: Callable[..., Any] = function) -> Any:
        return inner(x)

    return run


class Weakly:
    def __init__(self, function: Any) -> None:
        self.function = weakref.WeakMethod(function)

    def __call__(self, x: Tensor) -> Any:
        function = self.function()
        assert function is not None
        return function(x)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda f: torch.compile(f, backend="eager"),
    "decorated": decorated,
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", enabled=False),
    "disabled": torch.compiler.disable,
    "partial": functools.partial,
    "partial with attributes": lambda f: functools.update_wrapper(functools.partial(f), f),
    "lambda": halved,
    "object": Remembering,
    "memoized": memoized,
    "recursive": recursive,
    "default": by_default,
    "lru_cache": functools.lru_cache(maxsize=2),
    "weak method": Weakly,
    "twice": lambda f: decorated(torch.no_grad()(halved(f))),
    "context": lambda f: contextlib.contextmanager(lambda: numbers())()(f),
}


def wrapped(name: str, part: str = "") -> nn.Module:
    model = build()
    owner: Any = model.get_submodule(part)
    owner.forward = WRAPPERS[name](owner.forward)
    return model


def changed(model: nn.Module) -> nn.Module:
    return clone_structure(model, lambda one: torch.full_like(one.detach(), 0.25)).eval()


def changed_by_state(model: nn.Module) -> Tensor:
    """What a plain model gives with the weights of `changed`."""
    plain = build()
    plain.load_state_dict({name: torch.full_like(one, 0.25) for name, one in plain.state_dict().items()})
    out: Tensor = plain(X)
    return out.detach()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_replaced_forward_runs_on_the_weights_of_the_copy(name: str) -> None:
    model, scale = wrapped(name), 0.5 if name in ("lambda", "twice") else 1.0
    with torch.no_grad():
        assert torch.allclose(changed(model)(X), scale * changed_by_state(model))
        assert torch.allclose(model(X), scale * build()(X))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_replaced_forward_of_a_part_does_too(name: str) -> None:
    model = wrapped(name, "0")
    with torch.no_grad():
        before = shadow(model)(X)
        assert torch.equal(before, model(X))
        assert len(changed(model)(X).unique()) == 2  # all weights equal: one value a sample
        assert torch.equal(before, model(X))


# What else may lead to the model.
class Registry(nn.Module):
    """Calls its layer in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.way = way
        layer, weight = self.layer, self.layer.weight
        box = types.SimpleNamespace(inner={"deep": [layer]})
        self.held: Any = {
            "bound": layer.forward,
            "bound builtin": weight.matmul,
            "list of tensors": [weight],
            "tensor with a graph": weight * 1,
            "alias": weight.data,
            "view": weight.view(-1),
            "transposed": weight.T,
            "slice in a dict": {"top": weight[:2], "bottom": weight[2:]},
            "object": box,
            "weak": weakref.ref(layer),
            "proxy": [weakref.proxy(layer)],  # as an attribute it would be registered
            "weak values": weakref.WeakValueDictionary({"a": layer}),
            "weak keys": weakref.WeakKeyDictionary({layer: 1}),
            "weak set": weakref.WeakSet([layer]),
            "dict of lambdas": {"a": lambda x: layer(x)},
            "partial": functools.partial(F.linear, weight=weight, bias=layer.bias),
            "closure over a weight": lambda x: F.linear(x, weight, layer.bias),
            "iterator": itertools.repeat(layer),
            "method of a child": layer.__call__,
        }.get(way)
        if way == "hook":
            self.layer.register_forward_hook(lambda _module, args, _out: F.linear(args[0], weight, layer.bias))
        if way == "hook of another":
            self.layer.register_forward_pre_hook(functools.partial(_scaled, self))

    def forward(self, x: Tensor) -> Any:
        held, bias = self.held, self.layer.bias
        ways: dict[str, Callable[[], Any]] = {
            "bound builtin": lambda: held(x.T).T + bias,
            "list of tensors": lambda: F.linear(x, held[0], bias),
            "alias": lambda: F.linear(x, held, bias),
            "view": lambda: F.linear(x, held.view(4, 4), bias),
            "transposed": lambda: x @ held + bias,
            "slice in a dict": lambda: F.linear(x, torch.cat([held["top"], held["bottom"]]), bias),
            "object": lambda: held.inner["deep"][0](x),
            "weak": lambda: held()(x),
            "proxy": lambda: held[0](x),
            "weak values": lambda: held["a"](x),
            "weak keys": lambda: next(iter(held))(x),
            "weak set": lambda: next(iter(held))(x),
            "dict of lambdas": lambda: held["a"](x),
            "iterator": lambda: next(held)(x),
            "hook": lambda: self.layer(x),
            "hook of another": lambda: self.layer(x),
        }
        return ways.get(self.way, lambda: held(x))()


def _scaled(owner: Registry, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * (owner.layer.weight.sum() / owner.layer.weight.sum()),)


WAYS = (
    *("bound", "bound builtin", "list of tensors", "alias", "view", "transposed", "slice in a dict", "object", "weak"),
    *("proxy", "weak values", "weak keys", "weak set", "dict of lambdas", "partial", "closure over a weight"),
    *("iterator", "method of a child", "hook", "hook of another"),
)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_leads_to_a_layer_leads_to_that_of_the_copy(way: str) -> None:
    model = Registry(way).eval()
    with torch.no_grad():
        expected = model(X)
        out = changed(model)(X)
        assert torch.allclose(out, F.linear(X, torch.full((4, 4), 0.25), torch.full((4,), 0.25)))
        assert torch.equal(model(X), expected)


def test_attributes_of_a_copy_follow_its_weights() -> None:
    copied = changed(Registry("view"))
    with torch.no_grad():
        copied.layer.weight.fill_(2.0)
    assert copied.held.unique().tolist() == [2.0]


# What cannot be copied.
@dataclass
class State:
    hidden: Tensor
    lock: Any


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


def give(module: nn.Module, attribute: str, value: object) -> None:
    setattr(module, attribute, value)


def holding(value: object) -> nn.Sequential:
    model = build()
    give(model[0], "held", value)
    return model


def with_graph() -> Tensor:
    return torch.ones(2, requires_grad=True) * 2


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


def numbers() -> Iterator[int]:
    yield 1


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


@pytest.mark.parametrize("what", ["layer", "model", "weight"])
def test_a_copy_that_leads_back_to_the_model_is_refused(what: str) -> None:
    model = build()
    give(model[2], "held", Selfish({"layer": model[0], "model": model, "weight": model[0].weight}[what]))
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


LAYERS: dict[str, Any] = {}


class LooksUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LAYERS["layer"] = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return LAYERS["layer"](x)


def test_a_forward_that_looks_layers_up_in_a_global_is_known() -> None:
    model = LooksUp()
    with pytest.raises(ModelError, match="forward: uses the global variable LAYERS, which leads to the model itself"):
        check_globals(model)
    LAYERS.clear()
    check_globals(model)


# Ordinary models are copied as ever.
class Slots(nn.Module):
    __slots__ = ("__shift", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.__shift = 2.0, 1.0
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.scale + self.__shift


class Own(nn.Module):
    """Copies itself, with its children."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
        new = Own.__new__(Own)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.copies += 1
        return new

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(4))
    model(X)
    return model


def with_trainer() -> nn.Module:
    model = build()
    trainer: Any = types.SimpleNamespace(model=model, lock=threading.RLock(), log=logging.getLogger("train"))
    trainer.optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    trainer.optimizer.step()
    trainer.schedule = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    give(model, "trainer", trainer)
    return model


@pytest.mark.parametrize("make", [Slots, Own, tied, shared, lazy, with_trainer])
def test_unusual_models_are_copied(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    copied = shadow(model)
    with torch.no_grad():
        assert torch.equal(copied(X), model(X))
    assert [tensor.names for tensor in find_tensors(copied)] == [tensor.names for tensor in find_tensors(model)]
    if make is with_trainer:
        assert copied.trainer.model is copied
        assert copied.trainer.optimizer.param_groups[0]["params"][0] is copied[0].weight


def test_a_handle_of_a_hook_removes_that_of_the_copy() -> None:
    model = build()
    give(model, "handle", model[0].register_forward_hook(lambda *_: torch.zeros(2, 8)))
    copied = shadow(model)
    copied.handle.remove()
    assert not copied[0]._forward_hooks
    assert model[0]._forward_hooks


def test_a_chain_that_is_too_long_is_an_error() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(400)))
    for one, following in itertools.pairwise(model):
        give(one, "following", [following])
    with pytest.raises(ModelError, match="in a chain that is too long to be copied"):
        shadow(model)


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(3)
    model = wrapped("memoized").train()
    give(model[0], "held", State(with_graph(), threading.Lock()))
    before = torch.get_rng_state(), list(vars(model)), list(vars(model[0])), model.forward, model[0].held
    shadow(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (list(vars(model)), list(vars(model[0])), model.forward, model[0].held) == before[1:]
    assert all(module.training for module in model.modules())
