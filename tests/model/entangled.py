"""Small models whose functions and attributes lead back to themselves, and what they may hold."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pared.model.copies import clone_structure


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


def numbers() -> Iterator[int]:
    yield 1


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


# What cannot be copied.
@dataclass
class State:
    hidden: Tensor
    lock: Any


def give(module: nn.Module, attribute: str, value: object) -> None:
    setattr(module, attribute, value)


def holding(value: object) -> nn.Sequential:
    model = build()
    give(model[0], "held", value)
    return model


def with_graph() -> Tensor:
    return torch.ones(2, requires_grad=True) * 2


LAYERS: dict[str, Any] = {}


class LooksUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LAYERS["layer"] = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return LAYERS["layer"](x)
