"""Where a quantized model holds its numbers: codes in counterparts, floats in modules with hooks for state dicts."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from pared.errors import MismatchError, ModelError
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Float, Format, Grid, Grouped, Raw, dtype_name, survives_float16
from pared.formats.encoded.codes import with_steps
from pared.formats.grids import CODE_LIMITS
from pared.formats.streams import STEPS
from pared.formats.views import View, view_of
from pared.model.contents import Contents, Stored
from pared.model.copying.reach import Reach
from pared.model.tensors import registered_as
from pared.runtime.layers.counterpart import Counterpart, stand_in
from pared.runtime.layers.table import layer_of, weights_of
from pared.runtime.profile.profile import Profile, Running

# What stands beside the codes of a grid in a state dict: the ends of the names, by part.
_SHARED: Final[Mapping[str, str]] = {
    part: f"_{part.replace(' ', '_')}" for part in ("step", "scale", "multiple", "zero", "least", "least multiple")
}


class StoredForm:
    """The stored form of a tensor that a model holds as floats, for state dicts and files.

    Args:
        format: how the tensor is stored.
        view: the rows and columns of the tensor if the format is a grid, else None.
        shared: the parts of a grid beside its codes: "step", and what else scaled columns or groups have. Empty for
            other formats.
        is_buffer: whether the tensor may change: then it is stored exactly. A changed parameter is an error.
    """

    def __init__(
        self, format: Format, view: View | None, shared: Mapping[str, Tensor], *, is_buffer: bool = False
    ) -> None:
        self.is_buffer = is_buffer
        self.format = format
        self.view = view
        self.shared = shared
        self._codes: weakref.ref[Tensor] | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> StoredForm:
        """A copy with steps of its own; a model has one of these for each of its tensors."""
        shared = {name: part.clone() for name, part in self.shared.items()}
        return StoredForm(self.format, self.view, shared, is_buffer=self.is_buffer)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the last codes: weak references can be neither copied nor pickled."""
        return {**self.__dict__, "_codes": None}

    def coded(self, name: str, tensor: Tensor) -> Coded:
        """Encode the tensor; tied names get the same codes, so that files hold them once.

        Raises:
            ModelError: the format cannot hold the tensor exactly: it was changed after compression.
        """
        tensor = tensor.detach().cpu()
        known = self._codes() if self._codes is not None else None
        if known is not None and self.shared:
            coded = Coded(self.format, tuple(tensor.shape), tensor.dtype, {"codes": known, **self.shared}, self.view)
            if torch.equal(coded.decode(), tensor):
                return coded
        if isinstance(self.format, Grid):
            coded = self.format.encode(tensor, self.shared["step"], self.view, self.shared.get("scale"))
        elif isinstance(self.format, Grouped):
            coded = self.format.encode(tensor, self.shared, self.view)
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

    def load(self, value: Tensor, shared: Mapping[str, Tensor], own: Tensor, default: View) -> Tensor | None:
        """Take over what a state dict holds, in whatever format it is.

        Args:
            value: floats, or codes.
            shared: the parts beside codes.
            own: the tensor that is replaced.
            default: the view where this form has none.

        Returns:
            the floats; None: not codes, or of other groups than this form's.
        """
        if not shared and (value.is_floating_point() or not own.is_floating_point()):
            narrow = self.format if isinstance(self.format, Float) and survives_float16(value) else None
            self.format = narrow or Raw(dtype_name(own.dtype))
            self.view, self.shared = None, {}
            return value.to(own.dtype)
        kind, view = dtype_name(value.dtype), self.view or default
        if isinstance(self.format, Grouped) and kind == "int8":
            shapes = self.format.grid.shapes(view.n_rows, view.n_columns)
            if {"codes": shapes["codes"]} | {name: tuple(part.shape) for name, part in shared.items()} == shapes:
                self.shared = {
                    name: part.detach().to(self.shared[name].dtype, copy=True) for name, part in shared.items()
                }
                return Coded(self.format, tuple(value.shape), own.dtype, {"codes": value, **self.shared}, view).decode()
        sizes = {"step": view.row_sizes, "scale": view.across.row_sizes}
        if not {"step"} <= shared.keys() <= sizes.keys() or kind not in CODE_LIMITS:
            return None
        if any(part.numel() != math.prod(sizes[name]) for name, part in shared.items()):
            return None
        self.format, self.view = Grid(kind, scaled="scale" in shared), view  # type: ignore[arg-type]  # one of CODE_LIMITS
        self.shared = {name: part.detach().float().reshape(sizes[name]).clone() for name, part in shared.items()}
        return Coded(self.format, tuple(value.shape), own.dtype, {"codes": value, **self.shared}, view).decode()


def _narrow(
    forms: Mapping[str, StoredForm], _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """Hook of `state_dict`: put codes and steps, or narrow floats, in the place of floats."""
    for attribute, form in forms.items():
        name = f"{prefix}{attribute}"
        if name not in state:
            continue
        parts = form.coded(name, state[name]).parts
        state[name] = parts["codes"] if "codes" in parts else parts["values"]
        state |= {f"{name}{end}": parts[part] for part, end in _SHARED.items() if part in parts}


def _widen(forms: Mapping[str, StoredForm], module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Hook of `load_state_dict`: the inverse of `_narrow`, for whatever format the state dict has."""
    error_messages: list[str] = rest[-1]
    for attribute, form in forms.items():
        name = f"{prefix}{attribute}"
        shared = {part: state.pop(name + end) for part, end in _SHARED.items() if name + end in state}
        value, own = state.get(name), registered_as(module, attribute)
        if value is None or value.shape != own.shape:
            continue  # the module reports what is missing or misshapen
        kind = value.dtype
        floats = form.load(value, shared, own, view_of(module, attribute, tuple(value.shape)))
        if floats is not None:
            state[name] = floats
        elif isinstance(form.format, Grouped) or shared.keys() - {"step", "scale"}:
            error_messages.append(
                f"{name}: expected the codes of {form.format.label}, not {kind} with {sorted(shared)}."
            )
        else:
            error_messages.append(f"{name}: expected int8 or int16 codes with {name}_step, not {kind}.")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, where NaN equals NaN, and -0.0 equals 0.0."""
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def attach(forms: Mapping[str, StoredForm], module: nn.Module) -> None:
    """Let a module's state dict show the stored forms of its tensors, by attribute, and take them back."""
    module.register_state_dict_post_hook(functools.partial(_narrow, forms))
    module.register_load_state_dict_pre_hook(functools.partial(_widen, forms))


def detach(module: nn.Module) -> None:
    """Undo `attach`: the module's state dict shows floats again."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [k for k, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: object) -> bool:
    inner = getattr(hook, "hook", hook)  # torch wraps pre-hooks
    return isinstance(inner, functools.partial) and inner.func in (_narrow, _widen)


Memory = Literal["fast", "small"]


def running_of(model: nn.Module, contents: Contents, profile: Profile, memory: Memory) -> dict[str, Running]:
    """The kernel of each module that may run in int8, by name.

    Raises:
        MismatchError: one of these modules has no int8 kernel.
    """
    _check(model, contents)
    reasons = {
        (owner, attribute): why
        for stored in contents.tensors
        for owner, attribute in _owners(stored)
        if owner in contents.activations and (why := _obstacle(stored, model, owner))
    }
    return {
        name: _running(activation, _missing(model.get_submodule(name)), name, profile, memory)
        if reasons.keys().isdisjoint((name, attribute) for attribute in activation.weights)
        else Running("float32", next(reasons[name, one] for one in activation.weights if (name, one) in reasons))
        for name, activation in contents.activations.items()
    }


def _obstacle(stored: Stored, model: nn.Module, owner: str) -> str:
    """Why no kernel of a module can take the tensor's codes; nothing if one can."""
    fmt = stored.coded.format
    if isinstance(fmt, Grouped):
        return "its steps belong to groups of columns"
    takes_scales = isinstance(model.get_submodule(owner), (nn.Linear, nn.Embedding, nn.EmbeddingBag))
    if not isinstance(fmt, Grid) or not fmt.scaled or takes_scales:
        return ""
    return "its columns have scales"


def _running(activation: Activation, missing: str, name: str, profile: Profile, memory: Memory) -> Running:
    if activation.mode == "gather" and not missing:
        return Running("int8")  # looking up rows is as fast in codes, and takes a quarter of the memory
    if memory == "small" and activation.mode != "gather":
        return Running("float32", 'loaded with memory="small"')
    return profile.running(name, missing)


def held_in_codes(
    model: nn.Module,
    pairs: Sequence[tuple[Stored, list[Tensor]]],
    contents: Contents,
    running: dict[str, Running],
    memory: Memory,
    weight_only: bool,
) -> set[str]:
    """The names of the tensors that stay in codes; all others are held as floats.

    With `weight_only` those of linear layers and of tables do, even if their layers do not run in int8. `running` is
    changed to float32 where only some of a module's weights could be in codes: all of them or none are.
    """
    if not running and memory == "fast" and not weight_only:
        return set()
    elsewhere = Reach(model).held_elsewhere()
    free = [stored for stored, tensors in pairs if not any(id(tensor) in elsewhere for tensor in tensors)]
    while True:
        runs = [stored for stored in free if _runs_in_codes(stored, contents, running)]
        whole = {(owner, attribute) for stored in runs for owner, attribute in _owners(stored)}
        split = {
            part
            for name, activation in contents.activations.items()
            for parts in [_parts(model, name)]
            if running[name].kernel != "float32"
            and not {*((name, one) for one in activation.weights), *((part, "weight") for part in parts)} <= whole
            for part in (name, *parts)
        }
        if not split:
            break
        running |= dict.fromkeys(split, Running("float32", "one of its weights is also used elsewhere, as floats"))
    more = [stored for stored in free if _stays_in_codes(stored, model)] if memory == "small" or weight_only else []
    if memory == "fast":
        more = [stored for stored in more if _is_multiplied(stored, model, running)]
    return {stored.name for stored in (*runs, *more)}


def install(
    clone: nn.Module, contents: Contents, in_codes: set[str], running: Mapping[str, Running]
) -> dict[str, StoredForm]:
    """Add counterparts and hooks for every tensor; returns the stored forms of those that are held as floats."""
    stored_forms: dict[str, StoredForm] = {}
    hooked: dict[nn.Module, dict[str, StoredForm]] = {}
    held: dict[str, dict[str, Coded]] = {}  # what stays in codes, by module and attribute
    for stored in contents.tensors:
        coded = stored.coded
        if stored.name in in_codes:
            steps = {part: nn.Parameter(coded.parts[part], requires_grad=False) for part in coded.parts.keys() & STEPS}
            coded = replace(coded, parts=with_steps(coded.parts, steps))  # one of each for all that share the weight
            for owner, attribute in _owners(stored):
                held.setdefault(owner, {})[attribute] = coded
            continue
        shared = {name: part for name, part in coded.parts.items() if name in _SHARED}
        form = StoredForm(coded.format, coded.view, shared, is_buffer=stored.kind == "buffer")
        stored_forms[stored.name] = form
        for owner, attribute in _owners(stored):
            hooked.setdefault(clone.get_submodule(owner), {})[attribute] = form  # a shared module has it once
    for module, forms in hooked.items():
        attach(forms, module)
    for owner, coded_by_attribute in held.items():
        module = clone.get_submodule(owner)
        if isinstance(module, Counterpart):  # a shared module is met under each of its names
            continue
        here = running.get(owner, Running("float32"))
        activation = contents.activations[owner] if here.kernel != "float32" else _lookup(module, coded_by_attribute)
        stand_in(module, coded_by_attribute, activation, in_bfloat16=here.kernel == "bfloat16")
    return stored_forms


def _lookup(module: nn.Module, coded: Mapping[str, Coded]) -> Activation | None:
    """How a lookup table that stays in codes is read: by rows, with the same floats as decoding all of it."""
    layer, weights = layer_of(module), weights_of(module)
    is_table = layer is not None and layer.modes == ("gather",) and weights == tuple(coded)
    return Activation("gather", weights=weights) if is_table else None


def _check(model: nn.Module, contents: Contents) -> None:
    """Refuse a model without modules that the artifact runs in int8."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, activation in contents.activations.items():
        module = modules.get(name)
        layer = layer_of(module) if module is not None else None
        fits = module is not None and layer is not None and activation.mode in layer.modes
        if module is None or not fits or activation.weights != weights_of(module):
            raise MismatchError(
                f"the artifact runs this module in int8 ({activation.mode}), "
                + (f"which is not possible for a {type(module).__name__}" if module else "and the model lacks it"),
                where=name,
                remedy="Build the model with the same configuration, and with the same layers registered, as for "
                "pared.fit.",
            )


def _parts(model: nn.Module, name: str) -> list[str]:
    """The names of a module's children that it uses without calling them."""
    layer = layer_of(model.get_submodule(name))
    return [f"{name}.{part}".removeprefix(".") for part in layer.children] if layer is not None else []


def _missing(module: nn.Module) -> str:
    layer = layer_of(module)
    return layer.missing() if layer is not None else ""


def _owners(stored: Stored) -> list[tuple[str, str]]:
    """The names of the modules that own a tensor, each with the name of its attribute."""
    return [(module, attribute) for module, _, attribute in (name.rpartition(".") for name in stored.names)]


def _runs_in_codes(stored: Stored, contents: Contents, running: Mapping[str, Running]) -> bool:
    """Whether every name of the tensor is a weight of a module that runs on codes, with a step for each row."""
    return isinstance(stored.coded.format, Grid) and all(
        owner in running and attribute in contents.activations[owner].weights and running[owner].kernel != "float32"
        for owner, attribute in _owners(stored)
    )


def _stays_in_codes(stored: Stored, model: nn.Module) -> bool:
    """Whether a tensor is a matrix with a step for each row, that can only be read through its attribute."""
    if stored.kind != "parameter" or not isinstance(stored.coded.format, Grid) or len(stored.coded.shape) < 2:
        return False
    modules = [model.get_submodule(owner) for owner, _ in _owners(stored)]
    return not any(hasattr(one, "parametrizations") for one in modules)  # their property stands where ours would


def _is_multiplied(stored: Stored, model: nn.Module, running: Mapping[str, Running]) -> bool:
    """Whether a tensor is the int8 weight of linear layers, or a table, and none of them has another way to run."""
    fmt, owners = stored.coded.format, {owner for owner, _ in _owners(stored)}
    if not isinstance(fmt, Grid) or fmt.codes != "int8" or owners & running.keys():
        return False
    modules = [model.get_submodule(owner) for owner in owners]
    return all(type(one) is nn.Linear or _lookup(one, {"weight": stored.coded}) for one in modules)
