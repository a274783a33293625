"""What becomes of each tensor, by rules and defaults, decided before anything is rounded."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from pared.errors import ConfigError
from pared.fitting.config import Rule
from pared.fitting.experts.finding import mixtures
from pared.formats.coded import dtype_name, survives_float16, to_array
from pared.formats.exact_grids import is_whole
from pared.model.contents import Decision, Plan, Treatment, unregistered
from pared.model.state.tables import left_to_constructor
from pared.model.tensors import ModelTensor, ModelTensors

DEFAULT_BITS: Final = 8.0  # per weight, on a grid: plain int8
_NAMES_SHOWN: Final = 8  # names or shapes that an error lists
_TENSORS_SHOWN: Final = 3  # with their reasons
_EDITED: Final = "its module edits it while reading it (max_norm)"
# The largest magnitude of a tensor on a grid: sums of squares are computed in float32, and steps are small parts of it.
_LEAST, _MOST = 2.0**-60, 2.0**50
_ROUTER: Final = "it chooses among experts: kept exactly, unless a rule says otherwise"
_FAR: Final = "its values are beyond what a grid can hold"


def make_plan(
    model_tensors: ModelTensors[nn.Module],
    rules: Sequence[Rule],
    *,
    bits: float | None = DEFAULT_BITS,
    strict: bool = False,
    whole: ModelTensors[nn.Module] | None = None,
) -> Plan:
    """One decision per tensor: by the first rule that matches, else a grid where the tensor can be on one.

    Args:
        model_tensors: the model's tensors.
        rules: the user's, in order.
        bits: per weight, for grids that no rule asks for; None leaves their rates to the search.
        strict: refuse a tensor of two or more dimensions that would stay in float without a rule.
        whole: all tensors of the model, where the first are only some of them. Rules were checked with these.

    Raises:
        ConfigError: a rule matches no tensor, or none that can follow it; its function fails; or `strict` and there is
            such a tensor.
    """
    is_whole, whole = whole is None, model_tensors if whole is None else whole
    by_name = {one.name: found for one, found in zip(whole, _matching(whole, rules), strict=True)}
    matching = [by_name[one.name] for one in model_tensors]
    first = [found[0] if found else None for found in matching]
    claimed = [[one for one in whole if by_name[one.name][:1] == [rule]] for rule in rules]
    flat = {id(rule) for rule, tensors in zip(rules, claimed, strict=True) if not any(map(_on_grid, tensors))}
    for rule, tensors in zip(rules if is_whole else (), claimed, strict=False):
        _refuse_idle(rule, tensors, flat=id(rule) in flat)
    wide = _is_wide(model_tensors)
    computed = left_to_constructor(whole)
    routers = {name for mixture in mixtures(whole) for name in mixture.routers}
    plan = [
        Decision(model_tensor.name, "exact", None, _ROUTER)
        if rule is None and not routers.isdisjoint(model_tensor.names) and model_tensor.persistent
        else _default(model_tensor, bits, wide=wide, computed=model_tensor.name in computed)
        if rule is None or _obstacle(model_tensor, rule, flat=id(rule) in flat)
        else _by_rule(model_tensor, rule)
        for model_tensor, rule in zip(model_tensors, first, strict=True)
    ]
    if strict:
        decided = zip(model_tensors, plan, matching, strict=True)
        refuse_float((model_tensor, decision) for model_tensor, decision, found in decided if not found)
    return tuple(plan)


def first_rules(model_tensors: ModelTensors[nn.Module], rules: Sequence[Rule]) -> list[Rule | None]:
    """The rule that decides about each tensor; None if there is none.

    Raises:
        ConfigError: a rule matches no tensor; or its function fails.
    """
    return [found[0] if found else None for found in _matching(model_tensors, rules)]


def _matching(model_tensors: ModelTensors[nn.Module], rules: Sequence[Rule]) -> list[list[Rule]]:
    """All rules that match each tensor, in order."""
    types = {name: type(module) for name, module in model_tensors.model.named_modules(remove_duplicate=False)}
    matching = [[rule for rule in rules if _matches(rule, model_tensor, types)] for model_tensor in model_tensors]
    # A rule whose every tensor an earlier one claims still matches something.
    matched = {id(rule) for found in matching for rule in found}
    for rule in rules:
        if id(rule) not in matched:
            raise _unmatched(rule, model_tensors, types)
    return matching


def _matches(rule: Rule, model_tensor: ModelTensor, types: Mapping[str, type[nn.Module]]) -> bool:
    target = rule.target
    if isinstance(target, type):
        return any(issubclass(types[p], target) for name in model_tensor.names for p in _places(name) if p in types)
    if isinstance(target, str):
        return any(fnmatch.fnmatchcase(place, target) for name in model_tensor.names for place in _places(name))
    shape = tuple(model_tensor.tensor.shape)
    try:
        return bool(target(shape))
    except Exception as error:
        raise ConfigError(
            f"its function raised {type(error).__name__} for the shape {shape} of {model_tensor.name}: {error}",
            where=f"Rule({rule.label})",
            remedy="It is called with the shape of every tensor, biases too, and must return True or False.",
        ) from error


def _places(name: str) -> Iterable[str]:
    """The tensor's name, then those of the modules around it, from the innermost to the root's, which is empty."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _refuse_idle(rule: Rule, tensors: Sequence[ModelTensor], *, flat: bool) -> None:
    """Refuse a rule that no tensor which it decides can follow.

    Args:
        rule: the rule.
        tensors: those that it is the first to match.
        flat: there is no weight of two or more dimensions among them.
    """
    obstacles = [(one, _obstacle(one, rule, flat=flat)) for one in tensors if one.tensor.numel() > 0]
    if obstacles and all(why for _, why in obstacles):
        shown = "; ".join(f"{one.name}: {why}" for one, why in obstacles[:_TENSORS_SHOWN])
        more = f"; and {len(obstacles) - _TENSORS_SHOWN} more" if len(obstacles) > _TENSORS_SHOWN else ""
        raise ConfigError(
            f"no tensor that it matches can have bits={rule.bits:g} ({shown}{more})",
            where=f"Rule({rule.label})",
            remedy="Use keep=True, or leave the rule out: they are then stored without loss.",
        )


def _obstacle(model_tensor: ModelTensor, rule: Rule, *, flat: bool) -> str:
    """Why a tensor cannot follow a rule; empty if it can."""
    tensor = model_tensor.tensor
    if rule.keep:
        return ""
    if not tensor.is_floating_point():
        return f"{dtype_name(tensor.dtype)} has no coarser format"
    if _edits_itself(model_tensor):
        return _EDITED
    if not model_tensor.persistent:
        return "the state dict leaves it out"
    if rule.bits in (16, 32):
        return ""
    is_flat = model_tensor.fits_grid and not model_tensor.weight_like
    if tensor.dim() < 2 and not (flat and is_flat):
        return "only weights of two or more dimensions have a rate"
    if not _on_grid(model_tensor) and not is_flat:
        return _beyond(model_tensor) or "it is empty"
    own = own_grid_of(model_tensor) if _is_index(model_tensor) else None
    if _is_index(model_tensor) and (own is None or (own.bits or 0) > (rule.bits or 0)):
        return "its whole numbers, which may be a mask or indices, are never rounded"
    return ""


def _on_grid(model_tensor: ModelTensor) -> bool:
    """Whether a tensor can be on a grid as a weight."""
    return model_tensor.weight_like and model_tensor.fits_grid and not _beyond(model_tensor)


def _by_rule(model_tensor: ModelTensor, rule: Rule) -> Decision:
    reason = rule.because or f"rule {rule.label}"
    if rule.keep:
        return Decision(model_tensor.name, "exact", None, reason)
    if rule.bits == 32:
        return Decision(model_tensor.name, "float32", None, reason)
    if rule.bits == 16:
        if _survives(model_tensor):
            return Decision(model_tensor.name, "float16", None, reason)
        fits = model_tensor.tensor.dtype == torch.float64 and not _is_index(model_tensor) and not _beyond(model_tensor)
        treatment: Treatment = "float32" if fits else "exact"
        return Decision(model_tensor.name, treatment, None, f"{reason}; its values do not survive float16")
    own = own_grid_of(model_tensor)
    if own is not None and own.bits is not None and own.bits <= (rule.bits or 0):
        return replace(own, because=f"{reason}; {own.because}")
    return Decision(model_tensor.name, "grid", rule.bits, reason)


def own_grid_of(model_tensor: ModelTensor) -> Decision | None:
    """The decision for the grid that all numbers of a weight lie on already, with its rate; None if there is none."""
    own = model_tensor.own_grid if _on_grid(model_tensor) and not _edits_itself(model_tensor) else None
    if own is None:
        return None
    bits = round(8 * own.nbytes / model_tensor.tensor.numel(), 3)
    return Decision(
        model_tensor.name, "grid", bits, "its numbers lie on this grid already: nothing is lost", own_grid=True
    )


def _is_index(model_tensor: ModelTensor) -> bool:
    """Whether a tensor that no training changes holds whole numbers: a mask or indices, which must stay as they are."""
    if model_tensor.tensor.is_meta:
        return False
    fixed = model_tensor.kind == "buffer" or not model_tensor.tensor.requires_grad
    return fixed and model_tensor.tensor.is_floating_point() and is_whole(to_array(model_tensor.tensor))


def _survives(model_tensor: ModelTensor) -> bool:
    """Whether float16 is good enough: whole numbers, infinities and single float64 numbers have to survive exactly."""
    tensor = model_tensor.tensor.detach()
    if tensor.is_meta:
        return True
    flat = tensor.dtype == torch.float64 and (model_tensor.kind == "buffer" or tensor.dim() == 0)
    if (flat and tensor.dim() < 2) or _is_index(model_tensor) or not bool(tensor.isfinite().all()):
        return bool((tensor.half().to(tensor.dtype) == tensor).all())
    return survives_float16(tensor)


def _beyond(model_tensor: ModelTensor) -> str:
    """Why no grid can hold a floating tensor, whose arithmetic is in float32; empty if one can, or none is known."""
    tensor = model_tensor.tensor
    if not tensor.numel() or tensor.is_meta:
        return ""
    low, high = torch.aminmax(tensor.detach())
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        return "it holds NaN or infinities"
    return _FAR if largest and not _LEAST <= largest <= _MOST else ""


def _edits_itself(model_tensor: ModelTensor) -> bool:
    """Whether the module changes the tensor whenever it reads it, as tables with `max_norm` do."""
    return getattr(model_tensor.module, "max_norm", None) is not None


def _is_flat(tensor: Tensor) -> bool:
    """Whether each row is one number, as the gains of weight_norm are: a step would cost as much as the number."""
    return tensor.numel() == tensor.shape[0]


def _is_wide(model_tensors: ModelTensors[nn.Module]) -> bool:
    """Whether the model is one in float64: most of its weights are. Elsewhere float64 is where a grid is too coarse."""
    weights = [one.tensor for one in model_tensors if one.kind == "parameter" and one.tensor.is_floating_point()]
    return 2 * sum(one.numel() for one in weights if one.dtype == torch.float64) > sum(one.numel() for one in weights)


def _default(model_tensor: ModelTensor, bits: float | None, *, wide: bool, computed: bool) -> Decision:
    tensor = model_tensor.tensor

    def exactly(because: str) -> Decision:
        return Decision(model_tensor.name, "exact", None, because)

    if _edits_itself(model_tensor):
        return exactly(_EDITED)
    if not model_tensor.persistent:
        return unregistered(model_tensor.name, computed)
    if tensor.dtype == torch.float64 and not wide:
        return exactly("float64 is kept exactly")
    if model_tensor.weight_like and tensor.numel() > 0:
        return _default_of_weight(model_tensor, bits) or exactly(
            "a buffer that holds NaN or infinities"
            if model_tensor.kind == "buffer" and not bool(torch.isfinite(tensor).all())
            else _beyond(model_tensor) or "its whole numbers are kept exactly"
        )
    if tensor.dtype in (torch.float32, torch.float64) and tensor.dim() <= 1:
        if bits is None and model_tensor.fits_grid and not _is_index(model_tensor) and not _beyond(model_tensor):
            return Decision(model_tensor.name, "grid", None, "")
        kind = "one dimension" if tensor.dim() else "a single number"
        if _survives(model_tensor):
            return Decision(model_tensor.name, "float16", None, f"{kind}: every value survives float16")
        return exactly(f"{kind}: its values do not survive float16, so they are kept exactly")
    if bits is None and model_tensor.fits_grid and not _is_index(model_tensor) and not _beyond(model_tensor):
        return Decision(model_tensor.name, "grid", None, "")
    return exactly(f"{dtype_name(tensor.dtype)} is kept exactly")


def _default_of_weight(model_tensor: ModelTensor, bits: float | None) -> Decision | None:
    """A grid for a weight-like tensor, or float16; None if it must be kept exactly."""
    tensor = model_tensor.tensor
    if not _on_grid(model_tensor):
        return own_grid_of(model_tensor) if _beyond(model_tensor) == _FAR else None  # a mask of very large numbers
    own = own_grid_of(model_tensor)
    index = _is_index(model_tensor)
    if own is not None and (index or model_tensor.kind == "buffer" or (bits is not None and (own.bits or 0) <= bits)):
        return own
    if index:
        return None
    if bits is not None and tensor.numel() > 1 and _is_flat(tensor):
        survives = _survives(model_tensor)
        because = "one number per row" + ("" if survives else ", which does not survive float16")
        return Decision(model_tensor.name, "float16" if survives else "exact", None, because)
    return Decision(model_tensor.name, "grid", bits, "")


def _unmatched(rule: Rule, model_tensors: ModelTensors[nn.Module], types: Mapping[str, type[nn.Module]]) -> ConfigError:
    if isinstance(rule.target, str):
        names = [name for model_tensor in model_tensors for name in model_tensor.names] + [
            name for name in types if name
        ]
        near = difflib.get_close_matches(rule.target, names, n=3, cutoff=0.4)
    elif isinstance(rule.target, type):
        near = sorted({cls.__name__ for cls in types.values()})
    else:
        near = sorted({"x".join(map(str, model_tensor.tensor.shape)) or "scalar" for model_tensor in model_tensors})[
            :_NAMES_SHOWN
        ]
        return ConfigError(
            "matches no tensor of the model",
            where=f"Rule({rule.label})",
            remedy=f"Its function is called with a shape, a tuple; the model's shapes include: {', '.join(near)}.",
        )
    known = near or sorted({name for model_tensor in model_tensors for name in model_tensor.names})[:_NAMES_SHOWN]
    kind = "The nearest names are" if near else "The names of its tensors include"
    hint = f"{kind}: {', '.join(known)}." if known else "The model has no tensors."
    return ConfigError("matches no tensor of the model", where=f"Rule({rule.label})", remedy=hint)


def refuse_float(decided: Iterable[tuple[ModelTensor, Decision]]) -> None:
    """Refuse plans that leave a weight in float.

    Raises:
        ConfigError: a floating tensor of two or more dimensions has no grid; rows of one number each do not count.
    """
    left = [
        f"{model_tensor.name} ({model_tensor.tensor.nbytes} bytes: {decision.because})"
        for model_tensor, decision in decided
        if decision.treatment != "grid" and model_tensor.tensor.is_floating_point() and model_tensor.tensor.dim() >= 2
        if model_tensor.tensor.numel() > 0 and not _is_flat(model_tensor.tensor)
    ]
    if left:
        raise ConfigError(
            f"strict=True, but these tensors would stay in float: {'; '.join(left)}",
            where="PostTrainingQuantConfig",
            remedy="Give each one a Rule(..., keep=True, because=...), or leave out strict=True.",
        )
