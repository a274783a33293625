"""Where the tensors of a quantized model go: into counterparts, which run on codes, or into modules as floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from pared.errors import MismatchError
from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.model.contents import Contents, Stored
from pared.model.tensors import held_elsewhere
from pared.runtime.keeper import Keeper, attach
from pared.runtime.layers.counterpart import Counterpart, stand_in
from pared.runtime.layers.registry import layer_of, weights_of
from pared.runtime.profile import Profile, Running

Memory = Literal["fast", "small"]


def running_of(model: nn.Module, contents: Contents, profile: Profile, memory: Memory) -> dict[str, Running]:
    """What each module that may run in int8 runs in here.

    Raises:
        MismatchError: one of them cannot run in int8.
    """
    _check(model, contents)
    return {
        name: _running(activation, _missing(model.get_submodule(name)), name, profile, memory)
        for name, activation in contents.activations.items()
    }


def _running(activation: Activation, missing: str, name: str, profile: Profile, memory: Memory) -> Running:
    if activation.mode == "gather" and not missing:
        return Running("int8")  # looking up rows is as fast in codes, and takes a quarter of the memory
    if memory == "small" and activation.mode != "gather":
        return Running("float32", "memory is to stay small")
    return profile.running(name, missing)


def held_in_codes(
    model: nn.Module,
    pairs: Sequence[tuple[Stored, list[Tensor]]],
    contents: Contents,
    running: dict[str, Running],
    memory: Memory,
) -> set[str]:
    """The names of the tensors that stay in codes; the others are held as floats.

    `running` is corrected where a module cannot run as it says: it is in codes with all of its weights or with none.
    """
    elsewhere = held_elsewhere(model)
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
        running |= dict.fromkeys(split, Running("float32", "a weight of it is also used elsewhere, in floats"))
    small = [stored for stored in free if _stays_in_codes(stored, model)] if memory == "small" else []
    return {stored.name for stored in (*runs, *small)}


def install(
    clone: nn.Module, contents: Contents, in_codes: set[str], running: Mapping[str, Running]
) -> dict[str, Keeper]:
    """Counterparts and hooks for every tensor; the keepers of those that are held as floats."""
    keepers: dict[str, Keeper] = {}
    hooked: set[tuple[int, str]] = set()
    held: dict[str, dict[str, Coded]] = {}  # what stays in codes, by module and attribute
    for stored in contents.tensors:
        coded = stored.coded
        if stored.name in in_codes:
            step = nn.Parameter(coded.parts["step"], requires_grad=False)  # one for all that share the weight
            for owner, attribute in _owners(stored):
                held.setdefault(owner, {})[attribute] = replace(coded, parts={**coded.parts, "step": step})
            continue
        keeper = Keeper(coded.format, coded.view, coded.parts.get("step"), is_buffer=stored.kind == "buffer")
        keepers[stored.name] = keeper
        for owner, attribute in _owners(stored):
            module = clone.get_submodule(owner)
            if (id(module), attribute) not in hooked:
                hooked.add((id(module), attribute))
                attach(keeper, module, attribute)
    for owner, coded_by_attribute in held.items():
        module = clone.get_submodule(owner)
        if isinstance(module, Counterpart):  # a shared module is met under each of its names
            continue
        here = running.get(owner, Running("float32"))
        activation = contents.activations[owner] if here.kernel != "float32" else _lookup(module, coded_by_attribute)
        stand_in(module, coded_by_attribute, activation, in_bfloat16=here.kernel == "bfloat16")
    return keepers


def _lookup(module: nn.Module, coded: Mapping[str, Coded]) -> Activation | None:
    """A table that stays in codes is read by rows, which gives the same floats as decoding all of it."""
    layer, weights = layer_of(module), weights_of(module)
    is_table = layer is not None and layer.modes == ("gather",) and weights == tuple(coded)
    return Activation("gather", weights=weights) if is_table else None


def _check(model: nn.Module, contents: Contents) -> None:
    """Refuse modules that are to run in int8 and cannot."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, activation in contents.activations.items():
        module = modules.get(name)
        layer = layer_of(module) if module is not None else None
        fits = module is not None and layer is not None and activation.mode in layer.modes
        if module is None or not fits or activation.weights != weights_of(module):
            raise MismatchError(
                f"the artifact runs it in int8 ({activation.mode}), which a {type(module).__name__} cannot",
                where=name,
                remedy="Build the model with the configuration that the artifact was made from, and register its "
                "layers as they were.",
            )


def _parts(model: nn.Module, name: str) -> list[str]:
    """The children of a module that it uses without calling them."""
    layer = layer_of(model.get_submodule(name))
    return [f"{name}.{part}".removeprefix(".") for part in layer.parts] if layer is not None else []


def _missing(module: nn.Module) -> str:
    layer = layer_of(module)
    return layer.missing() if layer is not None else ""


def _owners(stored: Stored) -> list[tuple[str, str]]:
    """The modules that own a tensor, each with its attribute's name."""
    return [(module, attribute) for module, _, attribute in (name.rpartition(".") for name in stored.names)]


def _runs_in_codes(stored: Stored, contents: Contents, running: Mapping[str, Running]) -> bool:
    """Whether every name of the tensor is a weight of a module that runs on codes."""
    return all(
        owner in running and attribute in contents.activations[owner].weights and running[owner].kernel != "float32"
        for owner, attribute in _owners(stored)
    )


def _stays_in_codes(stored: Stored, model: nn.Module) -> bool:
    """Whether a tensor is large enough for codes, and nothing but reading the attribute gets at it."""
    if stored.kind != "parameter" or stored.decision.treatment != "grid" or len(stored.coded.shape) < 2:
        return False
    modules = [model.get_submodule(owner) for owner, _ in _owners(stored)]
    return not any(hasattr(one, "parametrizations") for one in modules)  # their property stands where ours would
