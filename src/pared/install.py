"""Where the tensors of a quantized model go: into counterparts, which run on codes, or into modules as floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from pared.contents import Contents, Stored
from pared.errors import MismatchError
from pared.formats import Coded
from pared.keeper import Keeper, attach
from pared.layers import Counterpart, layer_of, stand_in, weights_of
from pared.profile import Profile, Running
from pared.tensors import held_elsewhere

Memory = Literal["fast", "small"]


def running_of(model: nn.Module, contents: Contents, profile: Profile, memory: Memory) -> dict[str, Running]:
    """What each module that may run in int8 runs in here.

    Raises:
        MismatchError: one of them cannot run in int8.
    """
    _check(model, contents)
    if memory == "small":
        return dict.fromkeys(contents.activations, Running("float32", "memory is to stay small"))
    return {name: profile.running(name, _reason(model.get_submodule(name))) for name in contents.activations}


def held_in_codes(
    model: nn.Module,
    pairs: Sequence[tuple[Stored, list[Tensor]]],
    contents: Contents,
    running: Mapping[str, Running],
    memory: Memory,
) -> set[str]:
    """The names of the tensors that stay in codes; the others are held as floats."""
    elsewhere = held_elsewhere(model)
    return {
        stored.name
        for stored, tensors in pairs
        if not any(id(tensor) in elsewhere for tensor in tensors)
        and (_runs_in_codes(stored, contents, running) or (memory == "small" and _stays_in_codes(stored, model)))
    }


def install(
    clone: nn.Module, contents: Contents, in_codes: set[str], running: Mapping[str, Running]
) -> dict[str, Keeper]:
    """Counterparts and hooks for every tensor; the keepers of those that are held as floats."""
    keepers: dict[str, Keeper] = {}
    hooked: set[tuple[int, str]] = set()
    held: dict[str, dict[str, Coded]] = {}  # what stays in codes, by module and attribute
    for stored in contents.tensors:
        if stored.name in in_codes:
            for owner, attribute in _owners(stored):
                held.setdefault(owner, {})[attribute] = stored.coded
            continue
        coded = stored.coded
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
        runs = here.kernel != "float32" and set(contents.activations[owner].weights) <= set(coded_by_attribute)
        activation = contents.activations[owner] if runs else None
        stand_in(module, coded_by_attribute, activation, in_bfloat16=here.kernel == "bfloat16")
    return keepers


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


def _reason(module: nn.Module) -> str:
    layer = layer_of(module)
    return layer.reason() if layer is not None else ""


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
