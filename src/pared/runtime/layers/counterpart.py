"""A module that holds weights as codes: they read as floats, and products with them run on the codes.

A counterpart is the float module itself with another class (`layers.subclasses`). While its own `forward` runs, a
weight of a layer in the table `LAYERS` is a `WeightHandle`; when the handle reaches `F.linear`, a convolution or a
table lookup, the int8 kernel runs instead. So subclasses that pad or scale their input keep their code, and any other
function sees the weight as floats. Layers whose weights never reach such a function have a `forward` in the table.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid
from pared.formats.views import View
from pared.model.copies import clone_structure, refresh_recurrent
from pared.model.recorded.values import is_transformed
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.layers.casts import cast_floats, first_dtype
from pared.runtime.layers.dispatch import KERNELS, OUTPUTS
from pared.runtime.layers.registry import layer_of
from pared.runtime.layers.subclasses import Mixin, class_below, subclass_of
from pared.switches import CAPTURING

log = logging.getLogger(__name__)


class _Running(threading.local):
    """The counterpart whose forward is running in this thread."""

    module: Counterpart | None = None


_running = _Running()


class WeightHandle(torch.Tensor):
    """Stands for a weight inside its counterpart's forward: kernels get the codes, everything else the floats."""

    owner: Counterpart
    attribute: str

    @staticmethod
    def of(owner: Counterpart, attribute: str) -> WeightHandle:
        """A handle for one of the owner's weights: of its shape and type, without storage."""
        shape, dtype = owner.pared_codes(attribute).shape, owner.pared_dtypes[attribute]
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
            if owner.pared_views[attribute].rows in ((), (OUTPUTS.get(func, 0),)):
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


def codes_name(attribute: str) -> str:
    """The name of the buffer with a weight's codes."""
    return f"pared_{attribute}_codes"


def step_name(attribute: str) -> str:
    """The name of the parameter with a weight's steps."""
    return f"pared_{attribute}_step"


class Counterpart(Mixin):
    """Mixed in before a module's own class: weights are codes and steps, packed for the kernel at first use.

    The codes of a weight are a non-persistent buffer (int8 or int16, of the weight's shape); its steps are a parameter
    (float32, one per row) that `.half()` and `.to(dtype)` do not cast.

    Attributes:
        pared_views: by attribute, the weight as rows and columns.
        pared_dtypes: by attribute, the type that the weight reads as.
        pared_activation: how the input is treated; None: the module runs on floats, decoded whenever they are read.
        pared_in_bfloat16: whether the module runs on weights decoded to bfloat16, where that was faster.
    """

    pared_views: dict[str, View]
    pared_dtypes: dict[str, torch.dtype]
    pared_activation: Activation | None
    pared_in_bfloat16: bool
    _pared_plain: bool  # exactly nn.Linear: its forward is known, and the handle can be saved
    _pared_forward: Callable[..., Any] | None
    _pared_order: tuple[str, ...]  # the float module's parameters, in their order
    _pared_packed: dict[object, object]
    _pared_lock: threading.Lock

    def pared_codes(self, attribute: str) -> Tensor:
        """The codes of a weight."""
        return cast(Tensor, self._buffers[codes_name(attribute)])

    def pared_step(self, attribute: str) -> Tensor:
        """The steps of a weight's rows."""
        return cast(Tensor, self._parameters[step_name(attribute)]).detach()

    def pared_decode(self, attribute: str) -> Tensor:
        """A weight as floats: `step[row] * code`."""
        return self.pared_coded(attribute).decode()

    def pared_coded(self, attribute: str) -> Coded:
        """A weight's codes and steps as one value."""
        codes, dtype = self.pared_codes(attribute), self.pared_dtypes[attribute]
        parts = {"codes": codes, "step": self.pared_step(attribute)}
        kind: Any = "int8" if codes.dtype == torch.int8 else "int16"
        return Coded(Grid(kind), tuple(codes.shape), dtype, parts, self.pared_views[attribute])

    def pared_row_steps(self, attribute: str, outputs: int = 0) -> Tensor:
        """One step per output, given the weight's dimension that counts outputs; a single step is repeated."""
        return self.pared_step(attribute).reshape(-1).expand(self.pared_codes(attribute).shape[outputs]).contiguous()

    def pared_read(self, attribute: str) -> Tensor:
        """A weight's attribute: floats, decoded at each reading; inside the module's own forward, a handle."""
        if _running.module is self:
            return WeightHandle.of(self, attribute)
        return self.pared_decode(attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, on int8 kernels if they can serve this call."""
        if self.pared_activation is None or not self._pared_serves(args, kwargs):
            return super().forward(*args, **kwargs)
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
            return super().forward(*args, **kwargs)
        return out if type(out) is Tensor else tree_map(_plain, out)  # a weight that is given back is floats

    def _pared_serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether kernels can serve a call: not while a graph is captured, off the CPU, or if gradients are needed."""
        if not is_ordinary_call():
            return False
        if not self.pared_codes(next(iter(self.pared_views))).is_cpu:
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for attribute in self.pared_views:
            step = self._parameters[step_name(attribute)]
            destination[f"{prefix}{attribute}"] = self.pared_codes(attribute)
            destination[f"{prefix}{attribute}_step"] = step if keep_vars else self.pared_step(attribute)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attribute in self.pared_views:
            del destination[f"{prefix}{step_name(attribute)}"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing, _, error_messages = rest[-3:]
        for attribute in self.pared_views:
            name, own = f"{prefix}{attribute}", self.pared_codes(attribute)
            codes, step = state_dict.pop(name, None), state_dict.pop(f"{name}_step", None)
            if step is not None:
                state_dict[f"{prefix}{step_name(attribute)}"] = step
            if codes is None:
                missing.append(name)
            elif codes.dtype != own.dtype or codes.shape != own.shape:
                kind, found = str(own.dtype).removeprefix("torch."), f"{codes.dtype} {list(codes.shape)}"
                error_messages.append(f"{name}: expected {kind} codes {list(own.shape)}, found {found}")
            else:
                with torch.no_grad():
                    own.copy_(codes)
                self._pared_packed = {}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        shown = {f"{prefix}{step_name(attribute)}": f"{prefix}{attribute}_step" for attribute in self.pared_views}
        missing[:] = [shown.get(name, name) for name in missing]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to a device, or change the types that weights read as; codes and steps keep their types."""
        steps = {attribute: self.pared_step(attribute) for attribute in self.pared_views}
        dtypes = {a: fn(torch.empty(0, dtype=dtype)).dtype for a, dtype in self.pared_dtypes.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for attribute, step in steps.items():
            moved = cast(Tensor, self._parameters[step_name(attribute)])
            if moved.dtype != step.dtype:
                moved.data = step.to(moved.device)
            if self.pared_activation is not None and not moved.is_cpu:
                _tell_of_device(moved.device)
        self.pared_dtypes, self._pared_packed = dtypes, {}
        return self

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
    counterpart.pared_views, counterpart.pared_dtypes = {}, {}
    for attribute, weight in coded.items():
        assert weight.view is not None
        counterpart.pared_views[attribute], counterpart.pared_dtypes[attribute] = weight.view, weight.dtype
        counterpart.register_buffer(codes_name(attribute), weight.parts["codes"], persistent=False)
        step = weight.parts["step"]  # already a parameter where the weight is tied
        step = step if isinstance(step, nn.Parameter) else nn.Parameter(step, requires_grad=False)
        counterpart.register_parameter(step_name(attribute), step)
    counterpart.pared_activation = activation
    counterpart.pared_in_bfloat16 = in_bfloat16 and activation is not None and activation.mode != "gather"
    plain_rows = all(view.rows in ((), (0,)) for view in counterpart.pared_views.values())
    counterpart._pared_plain = activation is not None and base is nn.Linear and plain_rows
    counterpart._pared_forward = layer.forward if layer is not None else None
    counterpart._pared_order = order


def restore(module: Counterpart) -> None:
    """Undo `stand_in`, in place: the float module, with its weights on the meta device."""
    for attribute in module.pared_views:
        shape, dtype = module.pared_codes(attribute).shape, module.pared_dtypes[attribute]
        weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        del module._buffers[codes_name(attribute)], module._parameters[step_name(attribute)]
        module._non_persistent_buffers_set.discard(codes_name(attribute))
        module._parameters[attribute] = weight
    # Optimizers and state dicts depend on the order of parameters.
    module._parameters = {name: module._parameters[name] for name in module._pared_order}
    for name in [name for name in module.__dict__ if name.startswith(("pared_", "_pared_"))]:
        del module.__dict__[name]
    module.__class__ = class_below(type(module))  # type: ignore[assignment]  # what it was
    refresh_recurrent(module)


@functools.cache  # once, not for every layer
def _tell_of_device(device: torch.device) -> None:
    log.warning("int8 kernels run on the CPU only: on %s the layers run on floats, decoded from the codes", device)


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


def run_kernel(
    func: Callable[..., Any], owner: Counterpart, attribute: str, x: Tensor, *rest: Any, **named: Any
) -> Tensor:
    """The product with one of the owner's weights, by the kernel that was measured to be fastest."""
    if not owner.pared_in_bfloat16:
        try:
            return KERNELS[func](owner, attribute, x, *rest, **named)
        except NotFiniteError:
            return _with_what_is_not_finite(func, owner, attribute, x, *rest, **named)
    weight = owner.pared_packed((attribute, "bfloat16"), lambda: owner.pared_decode(attribute).bfloat16())
    rest, named = cast_floats((rest, named), torch.bfloat16)
    out: Tensor = func(x.bfloat16(), weight, *rest, **named)
    return out.to(x.dtype)


def _with_what_is_not_finite(
    func: Callable[..., Any], owner: Counterpart, attribute: str, x: Tensor, *rest: Any, **named: Any
) -> Tensor:
    """The product for an input with NaN or Inf: not finite where the float layer's is, else as without them."""
    clean = KERNELS[func](owner, attribute, x.nan_to_num(0.0, 0.0, 0.0), *rest, **named)
    rest, named = cast_floats((rest, named), torch.float32)
    exact = func(x.detach().float(), owner.pared_decode(attribute).float(), *rest, **named).to(clean.dtype)
    return torch.where(exact.isfinite(), clean, exact)


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
