"""A module that holds its weight as int8 codes and runs on them.

A counterpart is the float module itself with another class: a dynamic subclass of its own class, so `isinstance`,
attributes, hooks and the module's own `forward` stay. While that `forward` runs, `self.weight` is a `WeightHandle`;
when the handle reaches `F.linear`, `F.conv*` or `F.embedding`, the int8 kernel runs instead. So subclasses that pad or
scale their input are served by the code that they already have, and whatever else is done with the weight sees floats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pared.formats import Coded, Grid
from pared.kernels import conv, linear
from pared.kernels.conv import Geometry
from pared.layers.activation import Activation
from pared.views import View

# Module types whose weight, used in their own forward, can stay in codes. Subclasses count: their forward is run.
LAYERS: Final[dict[type[nn.Module], tuple[str, ...]]] = {
    nn.Linear: ("static", "dynamic"),
    nn.Conv1d: ("static", "dynamic"),
    nn.Conv2d: ("static", "dynamic"),
    nn.Conv3d: ("static", "dynamic"),
    nn.Embedding: ("gather",),
}


def _is_traced() -> bool:
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # torch's
    return traced


def is_candidate(module: nn.Module) -> bool:
    """Whether a counterpart exists for the module."""
    if not isinstance(module, tuple(LAYERS)) or "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None  # max_norm edits the table while it is read
    return not hasattr(module, "parametrizations")


def modes_of(module: nn.Module) -> tuple[str, ...]:
    """The modes that a counterpart of the module has."""
    return next(modes for cls, modes in LAYERS.items() if isinstance(module, cls))


class _Running(threading.local):
    """The counterpart whose forward this thread is in."""

    module: Counterpart | None = None


_running = _Running()


class WeightHandle(torch.Tensor):
    """Stands for a counterpart's weight inside its own forward: kernels take the codes, all else the floats."""

    owner: Counterpart

    @staticmethod
    def of(owner: Counterpart) -> WeightHandle:
        """A handle of the owner's weight: its shape and type, without storage."""
        handle = torch.Tensor._make_wrapper_subclass(WeightHandle, owner.pared_codes.shape, dtype=owner.pared_dtype)
        handle.owner = owner
        return handle

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Send products to the owner's kernel."""
        if func in KERNELS and len(args) > 1 and isinstance(args[1], WeightHandle) and _is_input(func, args[0]):
            return _run(func, args[1].owner, args[0], *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # else the result would be a handle too
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks `func`
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Everything else sees the floats."""

        def plain(value: object) -> object:
            return value.owner.pared_decode() if isinstance(value, WeightHandle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Counterpart(nn.Module):
    """Mixed in before a module's own class: the weight is codes and steps, packed for the kernel at first use.

    Attributes:
        pared_codes: int8, of the weight's shape; a buffer outside the state dict.
        pared_step: float32, one per row; never cast by `.half()` or `.to(dtype)`.
        pared_view: which dimensions of the weight are rows.
        pared_activation: how the input is treated.
        pared_in_bfloat16: products run on the weight decoded to bfloat16, where that was measured to be faster.
        pared_dtype: the type that `weight` reads as.
    """

    pared_codes: Tensor
    pared_step: Tensor
    pared_view: View
    pared_activation: Activation
    pared_in_bfloat16: bool
    pared_dtype: torch.dtype
    _pared_plain: bool  # exactly nn.Linear: its forward is known, and the handle can be saved
    _pared_packed: dict[object, object]
    _pared_lock: threading.Lock

    @property
    def weight(self) -> Tensor:
        """The weight as floats, decoded at each reading; inside the module's own forward, a handle of it."""
        if _running.module is self:
            return WeightHandle.of(self)
        return self.pared_decode()

    def pared_decode(self) -> Tensor:
        """The weight as floats: `step[row] * code`."""
        return self.pared_coded().decode()

    def pared_coded(self) -> Coded:
        """The weight's codes and steps as a value."""
        parts = {"codes": self.pared_codes, "step": self.pared_step.detach()}
        return Coded(Grid("int8"), tuple(self.pared_codes.shape), self.pared_dtype, parts, self.pared_view)

    def pared_row_steps(self) -> Tensor:
        """One step per output: a weight with a single step for all is spread."""
        return self.pared_step.detach().reshape(-1).expand(self.pared_codes.shape[0]).contiguous()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward; its weight goes to the int8 kernel where that gives all that is asked for."""
        if not self._pared_serves(args, kwargs):
            return super().forward(*args, **kwargs)
        if self._pared_plain and len(args) == 1 and not kwargs and _is_input(F.linear, args[0]):
            return _run(F.linear, self, args[0], self._parameters["bias"])
        outer, _running.module = _running.module, self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.module = outer

    def _pared_serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Not while a graph is captured (packed weights are opaque), off the CPU, or where gradients are wanted."""
        if torch.compiler.is_compiling() or _is_traced() or not self.pared_codes.is_cpu:
            return False
        own = self._parameters.values()
        return not torch.is_grad_enabled() or not any(
            isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values(), *own)
        )

    def pared_packed(self, key: object, pack: Callable[[], Any]) -> Any:
        """The kernel's own form of the weight, made once per way of calling, under a lock."""
        found = self._pared_packed.get(key)
        if found is None:
            with self._pared_lock:
                found = self._pared_packed.get(key)
                if found is None:
                    found = self._pared_packed[key] = pack()
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.pared_codes
        destination[f"{prefix}weight_step"] = self.pared_step if keep_vars else self.pared_step.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}pared_step"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        error_messages: list[str] = rest[-1]
        codes = state_dict.pop(f"{prefix}weight", None)
        state_dict[f"{prefix}pared_step"] = state_dict.pop(f"{prefix}weight_step", None)
        if state_dict[f"{prefix}pared_step"] is None:
            del state_dict[f"{prefix}pared_step"]
        if codes is None or codes.dtype != self.pared_codes.dtype or codes.shape != self.pared_codes.shape:
            found = "nothing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
            error_messages.append(f"{prefix}weight: expected int8 codes {list(self.pared_codes.shape)}, found {found}")
        else:
            with torch.no_grad():
                self.pared_codes.copy_(codes)
            self._pared_packed = {}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to a device, or change the type that the weight reads as; codes and steps keep theirs."""
        step = self._parameters.pop("pared_step")
        assert step is not None
        self.pared_dtype = fn(torch.empty(0, dtype=self.pared_dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        moved = fn(step.detach())
        if moved.dtype != step.dtype:
            moved = step.detach().to(moved.device)
        self._parameters["pared_step"] = nn.Parameter(moved, requires_grad=False)
        self._pared_packed = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the packed weights, which can be neither copied nor pickled, and the lock."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_pared_packed", "_pared_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start again without packed weights."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._pared_packed, self._pared_lock = {}, threading.Lock()

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Name the module's own class: the dynamic one cannot be imported."""
        return _new, (float_class(type(self)),), self.__getstate__()


_CLASSES: Final[dict[type[nn.Module], type[Counterpart]]] = {}


def _counterpart_class(base: type[nn.Module]) -> type[Counterpart]:
    if base not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES.setdefault(base, cast(type[Counterpart], type(base.__name__, (Counterpart, base), names)))
    return _CLASSES[base]


def float_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before a counterpart stood in for it."""
    order = cls.__mro__
    return order[order.index(Counterpart) + 1] if Counterpart in order else cls


def _new(base: type[nn.Module]) -> Counterpart:
    cls = _counterpart_class(base)
    return cls.__new__(cls)


def stand_in(module: nn.Module, coded: Coded, activation: Activation, *, in_bfloat16: bool = False) -> None:
    """Turn a float module into its counterpart, in place; its float weight is dropped.

    Args:
        module: a candidate (`is_candidate`).
        coded: the weight on an int8 grid.
        activation: how the input is treated; a mode that the module's type has (`LAYERS`).
        in_bfloat16: run products in bfloat16 instead.
    """
    assert isinstance(coded.format, Grid)
    assert coded.format.codes == "int8"
    assert coded.view is not None
    del module._parameters["weight"]
    module.__class__ = _counterpart_class(type(module))
    counterpart = cast(Counterpart, module)
    counterpart._pared_packed, counterpart._pared_lock = {}, threading.Lock()
    counterpart.register_buffer("pared_codes", coded.parts["codes"], persistent=False)
    counterpart.pared_step = nn.Parameter(coded.parts["step"], requires_grad=False)
    counterpart.pared_view = coded.view
    counterpart.pared_activation = activation
    counterpart.pared_in_bfloat16 = in_bfloat16 and activation.mode != "gather"
    counterpart.pared_dtype = coded.dtype
    counterpart._pared_plain = float_class(type(module)) is nn.Linear


def _is_input(func: Callable[..., Any], x: object) -> bool:
    """Whether the kernels take it: plain floats, or the indices of an embedding; all else is for the float function."""
    return type(x) is Tensor and (x.is_floating_point() or func is F.embedding)


def _run(func: Callable[..., Any], owner: Counterpart, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """A product of the owner's weight, by the kernel that was found to be fastest."""
    if not owner.pared_in_bfloat16:
        return KERNELS[func](owner, x, *rest, **named)
    weight = owner.pared_packed("bfloat16", lambda: owner.pared_decode().bfloat16())
    rest = tuple(a.bfloat16() if isinstance(a, Tensor) else a for a in rest)
    named = {key: a.bfloat16() if isinstance(a, Tensor) else a for key, a in named.items()}
    out: Tensor = func(x.bfloat16(), weight, *rest, **named)
    return out.to(x.dtype)


def _linear(owner: Counterpart, x: Tensor, bias: Tensor | None = None) -> Tensor:
    packed = owner.pared_packed(None, lambda: linear.pack(owner.pared_codes, owner.pared_row_steps()))
    if owner.pared_activation.mode == "dynamic":
        return linear.dynamic(x, packed, bias)
    return linear.static(x, packed, bias, owner.pared_activation.span)


def _convolution(owner: Counterpart, x: Tensor, bias: Tensor | None = None, *moves: Any, **named_moves: Any) -> Tensor:
    """The counterpart of `F.conv1d`, `F.conv2d` and `F.conv3d`: stride, padding, dilation and groups are `moves`."""
    geometry = Geometry.of(owner.pared_codes.shape[2:], *moves, **named_moves)
    packed = owner.pared_packed(geometry, lambda: conv.pack(owner.pared_codes, owner.pared_row_steps(), geometry))
    if owner.pared_activation.mode == "dynamic":
        return conv.dynamic(x, packed, bias)
    return conv.static(x, packed, bias, owner.pared_activation.span)


def _embedding(
    owner: Counterpart,
    indices: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Gather rows of codes and scale them; the other options concern training or have been ruled out."""
    del padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    rows = F.embedding(indices, owner.pared_codes).to(torch.float32)
    step = owner.pared_step.detach()
    return rows.mul_(F.embedding(indices, step.reshape(-1, 1)) if owner.pared_view.rows else step).to(owner.pared_dtype)


KERNELS: Final[dict[Callable[..., Any], Callable[..., Tensor]]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.embedding: _embedding,
}
