"""Tensors that a quantized model holds as floats: how they give their stored form again, in state dicts and files."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import ModelError
from pared.formats.coded import Coded, Float, Grid, Raw, dtype_name, survives_float16
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import View, view_of
from pared.model.tensors import registered


class Keeper:
    """Gives a float tensor of a live model its stored form again: in its state dict and in files.

    Args:
        format: of the tensor.
        view: of the tensor, for grids.
        step: float32, one per row, for grids.
        is_buffer: it may change; it is then kept exactly. A parameter that changed is an error.
    """

    def __init__(
        self, format: Grid | Float | Raw, view: View | None, step: Tensor | None, *, is_buffer: bool = False
    ) -> None:
        self.is_buffer = is_buffer
        self.format = format
        self.view = view
        self.step = step
        self._codes: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory of the last codes: weak references can be neither copied nor pickled."""
        return {**self.__dict__, "_codes": None}

    def coded(self, name: str, tensor: Tensor) -> Coded:
        """The tensor in its format; tied names get the same codes, so that files hold them once.

        Raises:
            ModelError: the tensor is not what the format decodes to: it was changed after compression.
        """
        tensor = tensor.detach().cpu()
        known = self._codes() if self._codes is not None else None
        if known is not None and self.step is not None:
            coded = Coded(
                self.format, tuple(tensor.shape), tensor.dtype, {"codes": known, "step": self.step}, self.view
            )
            if torch.equal(coded.decode(), tensor):
                return coded
        if isinstance(self.format, Grid):
            assert self.step is not None
            coded = self.format.encode(tensor, self.step, self.view)
        else:
            coded = self.format.encode(tensor)
        if not _same(coded.decode(), tensor):
            if self.is_buffer:  # the model's own forward may write it: streaming state, running averages
                return Raw(dtype_name(tensor.dtype)).encode(tensor)
            raise ModelError(
                "was changed after it was compressed, so its codes can no longer hold it",
                where=name,
                remedy="Compress the changed model again with pared.fit, or load the artifact afresh.",
            )
        if "codes" in coded.parts:
            self._codes = weakref.ref(coded.parts["codes"])
        return coded


def _narrow(
    keeper: Keeper, attribute: str, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """State dict hook: codes and steps, or narrow floats, in the place of floats."""
    name = f"{prefix}{attribute}"
    if name not in state:
        return
    coded = keeper.coded(name, state[name])
    state[name] = coded.parts["codes"] if isinstance(coded.format, Grid) else coded.parts["values"]
    if isinstance(coded.format, Grid):
        state[f"{name}_step"] = coded.parts["step"]


def _widen(keeper: Keeper, attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The inverse, before a module reads a state dict. What is stored may have another type than it had here."""
    name = f"{prefix}{attribute}"
    step, value = state.pop(f"{name}_step", None), state.get(name)
    own = dict(registered(module))[attribute]
    if value is None or value.shape != own.shape:
        return  # the module reports what is missing or misshapen
    if step is None and (value.is_floating_point() or not own.is_floating_point()):
        narrow = keeper.format if isinstance(keeper.format, Float) and survives_float16(value) else None
        keeper.format = narrow or Raw(dtype_name(own.dtype))
        keeper.view = keeper.step = None
        state[name] = value.to(own.dtype)
    elif step is None or dtype_name(value.dtype) not in CODE_LIMITS:
        error_messages: list[str] = rest[-1]
        error_messages.append(f"{name}: expected codes and {name}_step, found {value.dtype} alone.")
    else:
        keeper.format = Grid(dtype_name(value.dtype))  # type: ignore[arg-type]  # one of CODE_LIMITS
        keeper.view = keeper.view or view_of(module, attribute, tuple(value.shape))
        keeper.step = step.detach().float().reshape(keeper.view.row_sizes).clone()
        parts = {"codes": value, "step": keeper.step}
        state[name] = Coded(keeper.format, tuple(value.shape), own.dtype, parts, keeper.view).decode()


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself; -0.0 and 0.0 are equal too."""
    if a.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def attach(keeper: Keeper, module: nn.Module, attribute: str) -> None:
    """Let a module's state dict show a tensor's stored form, and take it back."""
    module.register_state_dict_post_hook(functools.partial(_narrow, keeper, attribute))
    module.register_load_state_dict_pre_hook(functools.partial(_widen, keeper, attribute))


def detach(module: nn.Module) -> None:
    """Undo `attach`: the module's state dict shows floats again."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [k for k, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: object) -> bool:
    inner = getattr(hook, "hook", hook)  # torch wraps pre-hooks
    return isinstance(inner, functools.partial) and inner.func in (_narrow, _widen)
