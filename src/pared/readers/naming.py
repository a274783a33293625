"""Names of tensors and modules: what wrappers and checkpoints put into them, and how those of two sides go together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

# The entries of checkpoints that hold a model, the likeliest first; one may stand within another. "module" is where
# DeepSpeed keeps it, "state_dict" where Lightning does.
HOLDERS: Final = (
    "state_dict", "model_state_dict", "model_state", "model_weights", "model", "module", "net", "network", "weights",
    "params", "params_ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip
# Parts of names that only wrappers use, wherever they wrap: torch.compile, FSDP, activation checkpointing.
_WRAPPERS: Final = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# DataParallel and DistributedDataParallel; a model may have a part of this name too.
_PARALLEL: Final = "module"
_PEFT: Final = "base_model.model."
_BEFORE_ALL: Final = (f"{_PARALLEL}.", _PEFT)


def without_wrappers(names: Sequence[str]) -> list[str]:
    """The names of a model's tensors as the model has them that was wrapped.

    What a part of the model may be called too is removed only where every name begins with it, and nothing is removed
    where two names would become one.

    >>> without_wrappers(["module.layers.0._fsdp_wrapped_module.weight", "module.head._orig_mod.bias"])
    ['layers.0.weight', 'head.bias']
    >>> without_wrappers(["module.weight", "head.weight"])
    ['module.weight', 'head.weight']
    """
    found = [_without(name, _WRAPPERS) for name in names]
    if len(set(found)) < len(set(names)):
        found = list(names)
    while prefix := next((one for one in _BEFORE_ALL if found and all(name.startswith(one) for name in found)), ""):
        found = [name.removeprefix(prefix) for name in found]
    return found


def unwrapped(name: str) -> str:
    """A dotted name without what may come from a wrapper: for comparing names, not for changing them.

    >>> unwrapped("module.encoder._orig_mod"), unwrapped("module"), unwrapped("base_model.model.head")
    ('encoder', '', 'head')
    """
    return _without(name, _WRAPPERS | {_PARALLEL}).removeprefix(_PEFT)


def bare(name: str) -> str:
    """A name without what may come from a wrapper or a checkpoint: for comparing names, not for changing them.

    >>> bare("state_dict/module.encoder._orig_mod.weight")
    'encoder.weight'
    """
    parts = unwrapped(name.replace("/", ".")).split(".")
    while len(parts) > 1 and parts[0] in HOLDERS:
        parts = parts[1:]
    return ".".join(parts)


def aligned(held: Collection[str], wanted: Collection[str]) -> Mapping[str, str]:
    """Which of the wanted names each name that is held stands for, if they differ by wrappers or by one prefix.

    Args:
        held: the names in an artifact.
        wanted: the names in a model.

    Returns:
        a wanted name for each that is held; empty where the names are equal already, or do not go together.

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
    """What stands before all names, and not before all others."""
    before, other = _prefix(names), _prefix(others)
    return before.removesuffix(other) if before.endswith(f".{other}") or not other else ""


def _prefix(names: Collection[str]) -> str:
    """The modules in which all names are, with a dot behind them."""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:shared])
