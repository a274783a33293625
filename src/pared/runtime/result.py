"""What a quantized model offers beside what its own class has: `q.pared`, and a few names that give way to its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final, Literal

from torch import Tensor, nn

from pared.artifact.outcome import Curve, Trial
from pared.errors import ModelError
from pared.model import storage
from pared.model.contents import Contents
from pared.runtime import summary
from pared.runtime.record import curve_of, record_of
from pared.runtime.serving.served import Served


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What came of compressing a model: `q.pared`. It is read-only, and always tells of the model as it is now.

    Args:
        model: the quantized model.
        contents_of: gives everything that its artifact holds.
    """

    model: nn.Module
    contents_of: Callable[[nn.Module], Contents]

    def __repr__(self) -> str:
        """How it went, in one line."""
        return f"<pared: met={self.met}, score={self.score}, baseline={self.baseline}, {len(self.trials)} trials>"

    @property
    def met(self) -> bool | None:
        """Whether the accuracy criterion was met; None if nothing was evaluated."""
        return record_of(self.model).outcome.met

    @property
    def score(self) -> float | None:
        """What `eval_func` gave for the quantized model; None if nothing was evaluated."""
        return record_of(self.model).outcome.score

    @property
    def baseline(self) -> float | None:
        """What `eval_func` gave for the float model; None if nothing was evaluated."""
        return record_of(self.model).outcome.baseline

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every model that the search evaluated, in order; empty for a model that was loaded."""
        return record_of(self.model).outcome.trials

    @property
    def plan(self) -> tuple[summary.TensorSummary, ...]:
        """What each tensor became: one line per tensor, in the model's order."""
        return summary.tensor_summaries(self.contents_of(self.model), record_of(self.model).running)

    @property
    def curve(self) -> Curve:
        """The trade-off curve of `fit`: bytes against damage, and the scores of the trials.

        Raises:
            ModelError: the model was loaded, or made without measuring what steps cost.
        """
        return curve_of(self.model)

    def nbytes(self) -> int:
        """The size in bytes of the `best_model.pt` that `save` writes; it is encoded to find out."""
        return len(storage.to_bytes(self.contents_of(self.model)))

    @property
    def engine(self) -> Literal["torch"]:
        """What runs the model; see `engine` of `pared.load`."""
        return "torch"

    @property
    def engine_ms(self) -> Mapping[str, float]:
        """The milliseconds of each engine, where `pared.load(..., engine="auto")` chose this one; else empty."""
        return record_of(self.model).engine_ms


_REGISTRIES: Final = ("_parameters", "_buffers", "_modules")


class Offered:
    """A name that a quantized model offers as long as the model has none of its own.

    Only `__get__` is defined: what the model's `forward` assigns to the name goes where it goes in any module, and
    from then on is what the name gives.

    Args:
        function: of the model; its result, or the function bound to the model, is what the name gives.
        is_method: whether it is bound.
    """

    def __init__(self, function: Callable[..., Any], *, is_method: bool = False) -> None:
        self.function = function
        self.is_method = is_method
        self.__doc__ = function.__doc__
        self._name = ""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: nn.Module | None, _owner: type | None = None) -> Any:
        """The value. AttributeError where the model has a tensor or module of that name: then torch looks it up."""
        if model is None:
            return self.function
        if any(self._name in model.__dict__.get(registry, ()) for registry in _REGISTRIES):
            raise AttributeError(self._name)
        return MethodType(self.function, model) if self.is_method else self.function(model)


class Yielding(Served):
    """Lets a module register tensors and modules under the names that it is offered: torch refuses known attributes."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module."""
        with _given_up(self, "_parameters", name):
            super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in every module."""
        with _given_up(self, "_buffers", name):
            super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in every module."""
        with _given_up(self, "_modules", name):
            super().add_module(name, module)


@contextmanager
def _given_up(model: nn.Module, registry: str, name: str) -> Iterator[None]:
    """Let a registry know a name of ours already, which torch then takes for a second registration."""
    own = any(name in model.__dict__[known] for known in _REGISTRIES) or name in model.__dict__
    if own or not isinstance(vars(type(model)).get(name), Offered):
        yield
        return
    model.__dict__[registry][name] = None
    try:
        yield
    except BaseException:
        del model.__dict__[registry][name]
        raise


def refuse_save_pretrained(self: nn.Module, *_args: object, **_options: object) -> None:
    """Not offered: `from_pretrained` would read the codes as if they were weights."""
    raise ModelError(
        "save_pretrained would write codes that from_pretrained takes for weights",
        where=type(self).__name__,
        remedy="Use pared.save(model, directory), and model.config.save_pretrained(directory) for the configuration.",
    )
