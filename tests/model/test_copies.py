"""Copies of models that are tied to themselves: whatever leads to a layer leads to that of the copy."""

import copy
import functools
import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import ModelError
from pared.model.copies import shadow
from pared.model.copying.ties import check_globals
from pared.model.tensors import find_tensors
from tests.model.entangled import (
    LAYERS,
    WRAPPERS,
    LooksUp,
    State,
    X,
    build,
    changed,
    changed_by_state,
    give,
    with_graph,
    wrapped,
)


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


def test_a_forward_that_looks_layers_up_in_a_global_is_known() -> None:
    model = LooksUp()
    with pytest.raises(ModelError, match="forward: uses the global variable LAYERS, which leads to the model itself"):
        check_globals(model)
    LAYERS.clear()
    check_globals(model)


class Wrapped(nn.Module):
    """Has an attribute of the name of a global variable, as most scripts have a `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x)


def test_an_attribute_is_no_global(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wrapped()
    monkeypatch.setitem(globals(), "encoder", model)
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


def symbolic() -> nn.Module:
    return torch.fx.symbolic_trace(build())


class Sized(nn.Module):
    """Its class asks for arguments before it is made."""

    def __new__(cls, _size: int) -> "Sized":
        return super().__new__(cls)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, size)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def sized() -> nn.Module:
    return Sized(4)


def made_of_a_layer_of_another_function() -> nn.Module:
    layer = nn.Linear(4, 4)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    return Around()


MAKERS = [Slots, Own, tied, shared, lazy, with_trainer, symbolic, sized, made_of_a_layer_of_another_function]


@pytest.mark.parametrize("make", MAKERS)
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


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(3)
    model = wrapped("memoized").train()
    give(model[0], "held", State(with_graph(), threading.Lock()))
    before = torch.get_rng_state(), list(vars(model)), list(vars(model[0])), model.forward, model[0].held
    shadow(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (list(vars(model)), list(vars(model[0])), model.forward, model[0].held) == before[1:]
    assert all(module.training for module in model.modules())
