"""What becomes of each tensor, by rules and defaults, decided before anything is rounded."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from pared.errors import ConfigError
from pared.fitting.config import Rule
from pared.formats.coded import dtype_name, survives_float16
from pared.model.contents import Decision, Plan
from pared.model.tensors import ModelTensor, ModelTensors

DEFAULT_BITS: Final = 8.0  # per weight, on a grid: plain int8


def make_plan(
    model_tensors: ModelTensors[nn.Module],
    rules: Sequence[Rule],
    *,
    bits: float | None = DEFAULT_BITS,
    strict: bool = False,
) -> Plan:
    """One decision per tensor: by the first rule that matches, else a grid where the tensor can be on one.

    Args:
        model_tensors: the model's tensors.
        rules: the user's, in order.
        bits: per weight, for grids that no rule asks for; None leaves their rates to the search.
        strict: refuse a tensor of two or more dimensions that would stay in float without a rule.

    Raises:
        ConfigError: a rule matches no tensor or its function fails, or `strict` and there is such a tensor.
    """
    types = {name: type(module) for name, module in model_tensors.model.named_modules(remove_duplicate=False)}
    matching = [[rule for rule in rules if _matches(rule, model_tensor, types)] for model_tensor in model_tensors]
    # A rule whose every tensor an earlier one claims still matches something.
    matched = {id(rule) for found in matching for rule in found}
    for rule in rules:
        if id(rule) not in matched:
            raise _unmatched(rule, model_tensors, types)
    plan = [
        _by_rule(model_tensor, found[0]) if found else _default(model_tensor, bits)
        for model_tensor, found in zip(model_tensors, matching, strict=True)
    ]
    if strict:
        decided = zip(model_tensors, plan, matching, strict=True)
        refuse_float((model_tensor, decision) for model_tensor, decision, found in decided if not found)
    return tuple(plan)


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


def _by_rule(model_tensor: ModelTensor, rule: Rule) -> Decision:
    reason = rule.because or f"rule {rule.label}"
    if _edits_itself(model_tensor):
        return _default(model_tensor, DEFAULT_BITS)
    if rule.keep or not model_tensor.tensor.is_floating_point():
        return Decision(model_tensor.name, "exact", None, reason)
    if rule.bits == 32:
        return Decision(model_tensor.name, "float32", None, reason)
    if rule.bits == 16:
        if survives_float16(model_tensor.tensor):
            return Decision(model_tensor.name, "float16", None, reason)
        return Decision(model_tensor.name, "exact", None, f"{reason}; its values do not survive float16")
    if not model_tensor.weight_like or model_tensor.tensor.numel() == 0:
        return _default(model_tensor, DEFAULT_BITS)  # a rule for a module is about its weights, not its biases
    if not bool(torch.isfinite(model_tensor.tensor).all()):
        return Decision(model_tensor.name, "exact", None, f"{reason}; it holds infinities")
    return Decision(model_tensor.name, "grid", rule.bits, reason)


def _edits_itself(model_tensor: ModelTensor) -> bool:
    """Whether the module changes the tensor whenever it reads it, as tables with `max_norm` do."""
    return getattr(model_tensor.module, "max_norm", None) is not None


def _is_flat(tensor: Tensor) -> bool:
    """Whether each row is one number, as the gains of weight_norm are: a step would cost as much as the number."""
    return tensor.numel() == tensor.shape[0]


def _default(model_tensor: ModelTensor, bits: float | None) -> Decision:
    tensor = model_tensor.tensor
    if _edits_itself(model_tensor):
        return Decision(model_tensor.name, "exact", None, "its module edits it while reading it (max_norm)")
    if bits is None and model_tensor.fits_grid and not model_tensor.weight_like:
        return Decision(model_tensor.name, "grid", None, "")
    if bits is not None and model_tensor.weight_like and tensor.numel() > 1 and _is_flat(tensor):
        survives = survives_float16(tensor)
        because = "one number per row" + ("" if survives else ", which does not survive float16")
        return Decision(model_tensor.name, "float16" if survives else "exact", None, because)
    if model_tensor.weight_like and tensor.numel() > 0:
        if model_tensor.kind == "parameter" or bool(torch.isfinite(tensor).all()):
            return Decision(model_tensor.name, "grid", bits, "")
        return Decision(model_tensor.name, "exact", None, "a buffer that holds NaN or infinities")
    if tensor.dtype == torch.float32 and model_tensor.persistent and tensor.dim() <= 1:
        kind = "one dimension" if tensor.dim() else "a single number"
        if survives_float16(tensor):
            return Decision(model_tensor.name, "float16", None, f"{kind}: every value survives float16")
        return Decision(
            model_tensor.name, "exact", None, f"{kind}: its values do not survive float16, so they are kept exactly"
        )
    if not model_tensor.persistent:
        return Decision(model_tensor.name, "exact", None, "a buffer that the state dict leaves out")
    return Decision(model_tensor.name, "exact", None, f"{dtype_name(tensor.dtype)} is kept exactly")


_NAMES_SHOWN: Final = 8  # names or shapes that an error lists


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
