"""A copy of a model in float32 or bfloat16, for the calls for which that is fastest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pared.model.copies import clone_structure, refresh_recurrent
from pared.model.recorded.state import Attributes
from pared.runtime.graphs.call_kinds import Argument, Bound, kind_of
from pared.runtime.graphs.containers import Container
from pared.runtime.layers.casts import cast_floats
from pared.runtime.serving.server import Capture, KindServer, ModelSnapshot, Sizes, Skeleton


def in_bfloat16(model: nn.Module) -> Callable[..., Any]:
    """A copy in bfloat16 of a float model in eval mode, as a function from and to float32."""
    copied = clone_structure(model, lambda tensor: cast_floats(tensor.detach(), torch.bfloat16))
    refresh_recurrent(copied)
    without_hooks(copied)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [cast_floats(one, torch.bfloat16) for one in args]
        named = {name: cast_floats(one, torch.bfloat16) for name, one in kwargs.items()}
        return cast_floats(copied(*given, **named), torch.float32)

    return run


def without_hooks(model: nn.Module) -> nn.Module:
    """The same model in eval mode, without the hooks on its modules: those of the model that it stands in for run."""
    for module in model.eval().modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


class FloatServer(KindServer):
    """Answers calls with a copy of the model whose weights are decoded, made at the first call.

    Args:
        skeleton: makes a float model of the same architecture and class, with all of its numbers.
        wanted: an example call for every call kind that is to be served.
        sizes: the sizes of these calls that are served; default: any.
        dtype: `torch.bfloat16`, or `torch.float32`: the model's own types stay as they are.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        wanted: Sequence[Sequence[Argument]] = (),
        sizes: Sequence[Sizes] = (),
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(skeleton, wanted, sizes)
        self._dtype = dtype
        self._copy: tuple[Callable[..., Any], ModelSnapshot, Attributes] | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> FloatServer:
        """A server for the copied model, which makes a copy of its own."""
        return FloatServer(self._skeleton, self.wanted, self.sizes, dtype=self._dtype)

    def _answer(self, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        del modules
        if kind_of(bound) not in self._kinds:  # `fit` has not seen what the model makes of other constants
            return NotImplemented
        if any(type(one) is Container for one in bound.values()):
            return NotImplemented  # a cache keeps the type of its numbers; only a strange file wants this
        run, snapshot = self._made(model)
        return run(**bound) if snapshot.is_undisturbed() else NotImplemented

    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        """Make the copy."""
        del captured
        if self._kinds:
            self._made(model)

    def _made(self, model: nn.Module) -> tuple[Callable[..., Any], ModelSnapshot]:
        with self._lock:
            if self._copy is None or not self._copy[1].is_current() or self._copy[2].changed():
                floats = self._skeleton(model)
                made = in_bfloat16(floats) if self._dtype is torch.bfloat16 else without_hooks(floats)
                self._copy = made, ModelSnapshot(model), Attributes(model.modules())
            run, snapshot, _ = self._copy
        return run, snapshot
