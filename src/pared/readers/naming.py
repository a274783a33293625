"""Names of tensors and modules: what wrappers and checkpoints add to them, and how to match those of two models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

# The entries of checkpoints that hold a model, the likeliest first; they may be nested. DeepSpeed uses "module",
# Lightning "state_dict".
HOLDERS: Final = (
    "state_dict", "model_state_dict", "model_state", "model_weights", "model", "module", "net", "network", "weights",
    "params", "params_ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip
# Components of names that only wrappers add, at any depth: torch.compile, FSDP, activation checkpointing.
_WRAPPERS: Final = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Added by DataParallel and DistributedDataParallel; a model may use this name itself.
_PARALLEL: Final = "module"
_PEFT: Final = "base_model.model."
_BEFORE_ALL: Final = (f"{_PARALLEL}.", _PEFT)
# The buffer that torch's AveragedModel has beside the model, which it holds as "module": how many it has averaged.
N_AVERAGED: Final = "n_averaged"


def without_wrappers(names: Sequence[str]) -> list[str]:
    """The names of a model's tensors, without what wrappers added.

    A prefix that may also be the name of a module is removed only if every name begins with it, and nothing is removed
    if two names would become equal.

    >>> without_wrappers(["module.layers.0._fsdp_wrapped_module.weight", "module.head._orig_mod.bias"])
    ['layers.0.weight', 'head.bias']
    >>> without_wrappers(["module.weight", "head.weight"])
    ['module.weight', 'head.weight']
    >>> without_wrappers(["n_averaged", "module.weight"])
    ['n_averaged', 'weight']
    """
    found = [_without(name, _WRAPPERS) for name in names]
    if len(set(found)) < len(set(names)):
        found = list(names)
    while prefix := _before_all([name for name in found if name != N_AVERAGED]):
        shorter = [name.removeprefix(prefix) for name in found]
        if len(set(shorter)) < len(set(found)):
            break
        found = shorter
    return found


def _before_all(names: Sequence[str]) -> str:
    """What a wrapper put before every name; "" if nothing."""
    return next((prefix for prefix in _BEFORE_ALL if names and all(name.startswith(prefix) for name in names)), "")


def unwrapped(name: str) -> str:
    """A dotted name without what a wrapper may have added: for comparing names, not for changing them.

    >>> unwrapped("module.encoder._orig_mod"), unwrapped("module"), unwrapped("base_model.model.head")
    ('encoder', '', 'head')
    """
    return _without(name, _WRAPPERS | {_PARALLEL}).removeprefix(_PEFT)


def bare(name: str) -> str:
    """A name without what a wrapper or a checkpoint may have added: for comparing names, not for changing them.

    >>> bare("state_dict/module.encoder._orig_mod.weight")
    'encoder.weight'
    """
    parts = unwrapped(name.replace("/", ".")).split(".")
    while len(parts) > 1 and parts[0] in HOLDERS:
        parts = parts[1:]
    return ".".join(parts)


def holders(name: str) -> tuple[int, ...]:
    """Where a checkpoint holds a tensor, for sorting: the place that holds the model comes first.

    >>> sorted(["ema/weight", "model/weight", "weight"], key=holders)
    ['weight', 'model/weight', 'ema/weight']
    """
    return tuple(HOLDERS.index(part) if part in HOLDERS else len(HOLDERS) for part in name.split("/")[:-1])


def aligned(held: Collection[str], wanted: Collection[str]) -> Mapping[str, str]:
    """Match an artifact's names to a model's, if they differ by wrappers or by one prefix.

    Returns:
        the model's name for each of the artifact's names; empty if the names are equal already, or do not match.

    >>> aligned(["net.0.weight", "net.0.bias"], ["0.weight", "0.bias"])
    {'net.0.weight': '0.weight', 'net.0.bias': '0.bias'}
    """
    if not held or not wanted or set(held) <= set(wanted):
        return {}
    more, less = _surplus(held, wanted), _surplus(wanted, held)
    keys: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
        (unwrapped, unwrapped),
        (lambda name: name.removeprefix(more), lambda name: name.removeprefix(less)),
        (bare, bare),
    )
    for of_held, of_wanted in keys:
        places = {of_wanted(name): name for name in wanted}
        found = {name: places[of_held(name)] for name in held if of_held(name) in places}
        if len(places) == len(set(wanted)) and len(set(found.values())) == len(set(held)):
            return found
    return {}


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _surplus(names: Collection[str], others: Collection[str]) -> str:
    """The prefix of all names that the others lack."""
    before, other = _prefix(names), _prefix(others)
    return before.removesuffix(other) if before.endswith(f".{other}") or not other else ""


def _prefix(names: Collection[str]) -> str:
    """The modules that contain all names, followed by a dot."""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:shared])
