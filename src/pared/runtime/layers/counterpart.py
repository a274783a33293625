"""A module that holds weights as codes: they read as floats, and products with them run on the codes.

A counterpart is the float module itself with another class (`layers.subclasses`). While its own `forward` runs, a
weight of a layer in the table `LAYERS` is a `WeightHandle`; when the handle reaches `F.linear`, a convolution or a
table lookup, the int8 kernel runs instead. So subclasses that pad or scale their input keep their code, and any other
function sees the weight as floats. Layers whose weights never reach such a function have a `forward` in the table.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.model.copies import clone_structure, refresh_recurrent
from pared.model.recorded.values import is_transformed
from pared.runtime.kernels import weight_only
from pared.runtime.layers.casts import cast_floats, first_dtype
from pared.runtime.layers.dispatch import KERNELS, run_kernel, takes
from pared.runtime.layers.holding.weights import Weights
from pared.runtime.layers.registry import layer_of
from pared.runtime.layers.subclasses import class_below, subclass_of
from pared.switches import CAPTURING


class _Running(threading.local):
    """The counterpart whose forward is running in this thread: on kernels, or on floats, with what it has decoded."""

    module: Counterpart | None = None
    on_floats: tuple[Counterpart, dict[str, Tensor]] | None = None


_running = _Running()


class WeightHandle(torch.Tensor):
    """Stands for a weight inside its counterpart's forward: kernels get the codes, everything else the floats."""

    owner: Counterpart
    attribute: str

    @staticmethod
    def of(owner: Counterpart, attribute: str) -> WeightHandle:
        """A handle for one of the owner's weights: of its shape and type, without storage."""
        shape, dtype = owner.pared_shape(attribute), owner.pared_dtypes[attribute]
        handle = torch.Tensor._make_wrapper_subclass(WeightHandle, shape, dtype=dtype)
        handle.owner, handle.attribute = owner, attribute
        return handle

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run products on the owner's kernel."""
        if func in KERNELS and kwargs and len(args) < 2 and "weight" in kwargs:
            names = ("input", "weight")[len(args) :]
            args = (*args, *(kwargs[name] for name in names if name in kwargs))
            kwargs = {name: value for name, value in kwargs.items() if name not in names}
        if func in KERNELS and len(args) > 1 and isinstance(args[1], WeightHandle) and _is_input(func, args[0]):
            owner, attribute = args[1].owner, args[1].attribute
            if takes(func, owner, attribute):
                return run_kernel(func, owner, attribute, args[0], *args[2:], **(kwargs or {}))
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
        """Run everything else on the floats."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: object) -> object:
    return value.owner.pared_decode(value.attribute) if isinstance(value, WeightHandle) else value


class Counterpart(Weights):
    """Mixed in before a module's own class: weights are codes and steps, packed for the kernel at first use.

    Attributes:
        pared_in_bfloat16: whether the module runs on weights decoded to bfloat16, where that was faster.
    """

    pared_in_bfloat16: bool
    _pared_plain: bool  # exactly nn.Linear, by rows: its forward is known, and the handle can be saved
    _pared_forward: Callable[..., Any] | None
    _pared_order: tuple[str, ...]  # the float module's parameters, in their order
    _pared_lock: threading.Lock

    def pared_read(self, attribute: str) -> Tensor:
        """A weight's attribute: floats, decoded at each reading; inside the module's own forward, a handle."""
        if _running.module is self:
            return WeightHandle.of(self, attribute)
        if _running.on_floats is None or _running.on_floats[0] is not self:
            return self.pared_decode(attribute)
        decoded = _running.on_floats[1]
        if attribute not in decoded:
            decoded[attribute] = self.pared_decode(attribute)
        return decoded[attribute]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, on int8 kernels if they can serve this call."""
        if self.pared_activation is None or not self._pared_serves(args, kwargs):
            return self._pared_on_floats(args, kwargs)
        if self._pared_plain and len(args) == 1 and not kwargs and _is_input(F.linear, args[0]):
            return run_kernel(F.linear, self, "weight", args[0], self._parameters["bias"])
        if self._pared_forward is not None and self.pared_in_bfloat16:
            return _in_bfloat16(self, args, kwargs)
        run = functools.partial(self._pared_forward, self) if self._pared_forward is not None else super().forward
        outer, _running.module = _running.module, self
        try:
            out = run(*args, **kwargs)
        finally:
            _running.module = outer
        if out is NotImplemented:
            return self._pared_on_floats(args, kwargs)
        return out if type(out) is Tensor else tree_map(_plain, out)  # a weight that is given back is floats

    def _pared_on_floats(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward on floats; a weight that it reads twice is decoded from bytes once."""
        if not is_ordinary_call():
            return super().forward(*args, **kwargs)
        if not self.pared_encoded:
            if self._pared_plain and self.pared_activation is None and len(args) == 1 and not kwargs:
                coded = self.pared_coded("weight")
                if weight_only.takes(args[0], coded) and self._pared_serves(args, kwargs):
                    return weight_only.product(args[0], coded, self._parameters["bias"])
            return super().forward(*args, **kwargs)
        outer, _running.on_floats = _running.on_floats, (self, {})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.on_floats = outer

    def _pared_serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether kernels can serve a call: not while a graph is captured, off the CPU, or if gradients are needed."""
        if not is_ordinary_call():
            return False
        if not self.pared_step(next(iter(self.pared_views))).is_cpu:
            return False
        if not torch.is_grad_enabled():
            return True
        given = (*tree_leaves((args, kwargs)), *self._parameters.values())
        floats = (one.data if isinstance(one, PackedSequence) else one for one in given)
        return not any(isinstance(one, Tensor) and one.requires_grad for one in floats)

    def pared_packed(self, key: object, pack: Callable[[], Any]) -> Any:
        """A weight packed for its kernel; `pack` makes it once per key, under a lock."""
        found = self._pared_packed.get(key)
        if found is None:
            with self._pared_lock:
                found = self._pared_packed.get(key)
                if found is None:
                    found = self._pared_packed[key] = pack()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The state without packed weights, which can be neither copied nor pickled, the lock and weak references."""
        return {key: value for key, value in self.__dict__.items() if key not in _LEFT_OUT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; weights are packed again at first use."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._pared_packed, self._pared_lock = {}, threading.Lock()

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Pickle under the module's own class: the subclass cannot be imported."""
        return _new, (class_below(type(self)), tuple(self.pared_views)), self.__getstate__()


_LEFT_OUT: Final = ("_pared_packed", "_pared_lock", "_flat_weight_refs")


def _counterpart_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[Counterpart]:
    def members() -> dict[str, Any]:
        names: dict[str, Any] = {
            attribute: property(functools.partial(Counterpart.pared_read, attribute=attribute))
            for attribute in attributes
        }
        if issubclass(base, nn.RNNBase):  # a list of the weights, which would keep the floats alive
            names["_flat_weights"] = property(_flat_weights, lambda _self, _value: None)
        return names

    return subclass_of(base, Counterpart, attributes, members)


def _flat_weights(module: Any) -> list[Tensor]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _new(base: type[nn.Module], attributes: tuple[str, ...]) -> Counterpart:
    cls = _counterpart_class(base, attributes)
    return object.__new__(cls)


def stand_in(
    module: nn.Module, coded: Mapping[str, Coded], activation: Activation | None, *, in_bfloat16: bool = False
) -> None:
    """Turn a float module into its counterpart, in place; its float weights are dropped.

    Args:
        module: any module; with an activation, one whose type is in `LAYERS`.
        coded: weights on grids, by attribute; with an activation, on int8 grids.
        activation: how the input is treated, in one of the modes of the module's type; None: the module runs on floats,
            decoded whenever they are read.
        in_bfloat16: run in bfloat16 instead of int8.
    """
    layer = layer_of(module) if activation is not None else None
    order = tuple(module._parameters)
    for attribute in coded:
        del module._parameters[attribute]
    module.__dict__.pop("_flat_weights", None)
    base = type(module)
    module.__class__ = _counterpart_class(base, tuple(coded))
    counterpart = cast(Counterpart, module)
    counterpart._pared_packed, counterpart._pared_lock = {}, threading.Lock()
    counterpart._pared_hold(coded)
    counterpart.pared_activation = activation
    counterpart.pared_in_bfloat16 = in_bfloat16 and activation is not None and activation.mode != "gather"
    plain_rows = all(view.rows in ((), (0,)) for view in counterpart.pared_views.values())
    counterpart._pared_plain = base is nn.Linear and plain_rows
    counterpart._pared_forward = layer.forward if layer is not None else None
    counterpart._pared_order = order


def restore(module: Counterpart) -> None:
    """Undo `stand_in`, in place: the float module, with its weights on the meta device."""
    for attribute in module.pared_views:
        module._pared_release(attribute)
    # Optimizers and state dicts depend on the order of parameters.
    module._parameters = {name: module._parameters[name] for name in module._pared_order}
    for name in [name for name in module.__dict__ if name.startswith(("pared_", "_pared_"))]:
        del module.__dict__[name]
    module.__class__ = class_below(type(module))  # type: ignore[assignment]  # what it was
    refresh_recurrent(module)


def is_ordinary_call() -> bool:
    """Whether neither a graph is being captured nor a function transformed: packed weights are opaque to both."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch.compiler.is_compiling():
        with CAPTURING:  # it may be a capture in another thread, as torch tells all threads: wait for it
            pass
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch's
        return False
    return not is_transformed()


def _is_input(func: Callable[..., Any], x: object) -> bool:
    """Whether kernels take this input: plain floats, or the indices of a table lookup."""
    return type(x) is Tensor and (x.is_floating_point() or func in (F.embedding, F.embedding_bag))


def _in_bfloat16(owner: Counterpart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of the whole module in bfloat16, in the type of the first floats of its input."""

    def copied() -> nn.Module:
        # Tensors that are not floats, among them the codes, are not copied.
        alone = clone_structure(owner, lambda one: one.detach().clone() if one.is_floating_point() else one)
        restore(alone)
        for attribute in owner.pared_views:
            alone._parameters[attribute] = nn.Parameter(owner.pared_decode(attribute), requires_grad=False)
        for hooks in (alone._forward_hooks, alone._forward_pre_hooks):
            hooks.clear()
        refresh_recurrent(alone)
        return alone.bfloat16()

    dtype = first_dtype((args, kwargs), next(iter(owner.pared_dtypes.values())))
    args, kwargs = cast_floats((args, kwargs), torch.bfloat16)
    return cast_floats(owner.pared_packed("bfloat16", copied)(*args, **kwargs), dtype)
