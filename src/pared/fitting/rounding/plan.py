"""What becomes of each tensor, decided before anything is rounded; and the decisions carried out."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from pared.errors import ConfigError
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.config import Rule
from pared.fitting.rounding.nearest import nearest
from pared.formats.coded import Coded, Float, Raw, dtype_name, survives_float16
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import View
from pared.model.contents import Decision, Plan, Treatment
from pared.model.tensors import ModelTensor, ModelTensors

DEFAULT_BITS: Final = 8.0
MOST_BITS: Final = 15.0


def make_plan(
    slots: ModelTensors[nn.Module],
    rules: Sequence[Rule],
    *,
    bits: float | None = DEFAULT_BITS,
    strict: bool = False,
) -> Plan:
    """One decision per tensor: the first rule that matches, else a grid at `bits` for whatever can be on one.

    With `bits=None` the rates of the latter are left to the search.

    Raises:
        ConfigError: a rule matches nothing, or `strict` and a tensor would be left in float without a rule.
    """
    types = {name: type(module) for name, module in slots.model.named_modules(remove_duplicate=False)}
    used: set[int] = set()
    plan = []
    for slot in slots:
        index = next((i for i, rule in enumerate(rules) if _matches(rule, slot, types)), None)
        # A rule whose every tensor was claimed by an earlier one still matches something.
        used.update(i for i, rule in enumerate(rules) if i not in used and _matches(rule, slot, types))
        plan.append(_default(slot, bits) if index is None else _by_rule(slot, rules[index]))
    for i, rule in enumerate(rules):
        if i not in used:
            raise _unmatched(rule, slots, types)
    if strict:
        named = [any(_matches(rule, slot, types) for rule in rules) for slot in slots]
        _refuse((slot, decision) for slot, decision, is_named in zip(slots, plan, named, strict=True) if not is_named)
    return tuple(plan)


def finer(
    plan: Plan, slots: ModelTensors[nn.Module], known: Mapping[str, TensorStats], *, strict: bool = False
) -> Plan:
    """The plan with its damages, and more than 8 bits for each tensor of which these alone would do too much.

    That happens where the channels of an input differ widely in scale: then so do the columns of a row, and its step
    is too coarse for those that count. Tensors that a rule names are left as they are.

    Args:
        plan: at the default rate.
        slots: the model's tensors.
        known: what errors cost, by the tensor's name.
        strict: whether a tensor of two or more dimensions for which no grid is fine enough is an error.

    Raises:
        ConfigError: `strict`, and there is such a tensor.
    """
    total = sum(slot.tensor.numel() for decision, slot in zip(plan, slots, strict=True) if decision.treatment == "grid")
    found = tuple(_finer(decision, slot, known, total) for decision, slot in zip(plan, slots, strict=True))
    if strict:
        _refuse([(slot, new) for slot, old, new in zip(slots, plan, found, strict=True) if new != old])
    return found


# The damage that a tensor may do alone at 8 bits: 30 dB below the output's energy. Finer codes run in float.
_ALONE: Final = 1e-3
# Of many weights that costs time and bytes that tell: of these all together may do 20 dB, shared out by their number.
_MANY: Final = 1 << 22
_TOGETHER: Final = 1e-2
# How many times a step of int16 codes may be halved against int8's: 127 * 2^8 still fits.
_MOST_HALVINGS: Final = 8
_SAMPLED_ROWS: Final = 64


def _allowed(weights: int, of: int) -> float:
    """The damage that a tensor of so many of a model's weights may do alone at 8 bits."""
    return max(_ALONE, _TOGETHER * weights / of) if weights >= _MANY else _ALONE


def _finer(decision: Decision, slot: ModelTensor, known: Mapping[str, TensorStats], weights: int) -> Decision:
    stats = known.get(slot.name)
    if decision.treatment != "grid" or decision.bits != DEFAULT_BITS or decision.because or stats is None:
        return decision
    matrix = slot.view.matrix(slot.tensor.detach().float())
    steps = matrix.abs().amax(1).double() / CODE_LIMITS["int8"]
    damage = float((stats.rows * steps.square()).sum()) / 12
    allowed = _allowed(slot.tensor.numel(), weights)
    if not allowed < damage < math.inf:
        return replace(decision, damage=damage if damage < math.inf else None)
    because = f"at 8 bits it would do a damage of {damage:.2g}"
    halvings = math.ceil(math.log(damage / allowed, 4))
    # Each halving of the step costs a bit more than what 8 bits take when they are coded.
    coded = 8 * sample_cost(slot, decision, _SAMPLED_ROWS).nbytes / slot.tensor.numel()
    bits = max(coded + halvings, DEFAULT_BITS + 0.01)  # up to 8 bits there is no finer step than int8's
    if halvings <= _MOST_HALVINGS and bits <= MOST_BITS:
        return replace(decision, bits=round(bits, 2), because=because, damage=damage / 4**halvings)
    # No grid is as fine; floats have a precision of their own for each number.
    treatment: Treatment = "float16" if survives_float16(slot.tensor) else "exact"
    return replace(decision, treatment=treatment, bits=None, because=because)


def _matches(rule: Rule, slot: ModelTensor, types: Mapping[str, type[nn.Module]]) -> bool:
    target = rule.target
    if isinstance(target, type):
        return any(issubclass(types[p], target) for name in slot.names for p in _places(name) if p in types)
    if isinstance(target, str):
        return any(fnmatch.fnmatchcase(place, target) for name in slot.names for place in _places(name))
    shape = tuple(slot.tensor.shape)
    try:
        return bool(target(shape))
    except Exception as error:
        raise ConfigError(
            f"its function raised {type(error).__name__} for the shape {shape} of {slot.name}: {error}",
            where=f"Rule({rule.label})",
            remedy="It is called with the shape of every tensor, biases too, and says True or False.",
        ) from error


def _places(name: str) -> Iterable[str]:
    """The tensor's own name and the name of every module around it, the root's empty name last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _by_rule(slot: ModelTensor, rule: Rule) -> Decision:
    reason = rule.because or f"rule {rule.label}"
    if _edits_itself(slot):
        return _default(slot, DEFAULT_BITS)
    if rule.keep or not slot.tensor.is_floating_point():
        return Decision(slot.name, "exact", None, reason)
    if rule.bits == 32:
        return Decision(slot.name, "float32", None, reason)
    if rule.bits == 16:
        if survives_float16(slot.tensor):
            return Decision(slot.name, "float16", None, reason)
        return Decision(slot.name, "exact", None, f"{reason}; its values do not survive float16")
    if not slot.weight_like or slot.tensor.numel() == 0:
        return _default(slot, DEFAULT_BITS)  # a rule for a module is about its weights, not its biases
    if not bool(torch.isfinite(slot.tensor).all()):
        return Decision(slot.name, "exact", None, f"{reason}; it holds infinities")
    return Decision(slot.name, "grid", rule.bits, reason)


def _edits_itself(slot: ModelTensor) -> bool:
    return getattr(slot.module, "max_norm", None) is not None


def _is_flat(tensor: Tensor) -> bool:
    """Whether each row is one number, as the gains of weight_norm are: a row would have a step for nothing."""
    return tensor.numel() == tensor.shape[0]


def _default(slot: ModelTensor, bits: float | None) -> Decision:
    tensor = slot.tensor
    if _edits_itself(slot):
        return Decision(slot.name, "exact", None, "its module edits it while reading it (max_norm)")
    if bits is None and slot.fits_grid and not slot.weight_like:
        return Decision(slot.name, "grid", None, "")
    if bits is not None and slot.weight_like and tensor.numel() > 1 and _is_flat(tensor):
        survives = survives_float16(tensor)
        because = "one number per row" + ("" if survives else ", which does not survive float16")
        return Decision(slot.name, "float16" if survives else "exact", None, because)
    if slot.weight_like and tensor.numel() > 0:
        if slot.kind == "parameter" or bool(torch.isfinite(tensor).all()):
            return Decision(slot.name, "grid", bits, "")
        return Decision(slot.name, "exact", None, "a buffer that holds NaN or infinities")
    if tensor.dtype == torch.float32 and slot.persistent and tensor.dim() <= 1:
        kind = "one dimension" if tensor.dim() else "a single number"
        if survives_float16(tensor):
            return Decision(slot.name, "float16", None, f"{kind}: every value survives float16")
        return Decision(
            slot.name, "exact", None, f"{kind}: its values do not survive float16, so they are kept exactly"
        )
    if not slot.persistent:
        return Decision(slot.name, "exact", None, "a buffer that the state dict leaves out")
    return Decision(slot.name, "exact", None, f"{dtype_name(tensor.dtype)} is kept exactly")


_SHAPES_SHOWN: Final = 8


def _unmatched(rule: Rule, slots: ModelTensors[nn.Module], types: Mapping[str, type[nn.Module]]) -> ConfigError:
    if isinstance(rule.target, str):
        names = [name for slot in slots for name in slot.names] + [name for name in types if name]
        near = difflib.get_close_matches(rule.target, names, n=3, cutoff=0.4)
    elif isinstance(rule.target, type):
        near = sorted({cls.__name__ for cls in types.values()})
    else:
        near = sorted({"x".join(map(str, slot.tensor.shape)) or "scalar" for slot in slots})[:_SHAPES_SHOWN]
        return ConfigError(
            "holds for no tensor of the model",
            where=f"Rule({rule.label})",
            remedy=f"It is called with a shape, a tuple; among the model's are: {', '.join(near)}.",
        )
    known = near or sorted({name for slot in slots for name in slot.names})[:_SHAPES_SHOWN]
    kind = "The nearest names are" if near else "Among the names of its tensors are"
    hint = f"{kind}: {', '.join(known)}." if known else "The model has no tensors."
    return ConfigError("matches no tensor of the model", where=f"Rule({rule.label})", remedy=hint)


def _refuse(decided: Iterable[tuple[ModelTensor, Decision]]) -> None:
    """Raise if a float tensor of two or more dimensions would be left in float."""
    left = [
        f"{slot.name} ({slot.tensor.numel() * slot.tensor.element_size()} bytes: {decision.because})"
        for slot, decision in decided
        if decision.treatment != "grid" and slot.tensor.is_floating_point() and slot.tensor.dim() >= 2
        if slot.tensor.numel() > 0 and not _is_flat(slot.tensor)
    ]
    if left:
        raise ConfigError(
            f"strict=True, but these would stay in float: {'; '.join(left)}",
            where="PostTrainingQuantConfig",
            remedy="Give each a Rule(..., keep=True, because=...), or leave strict out.",
        )


def encode(slot: ModelTensor, decision: Decision) -> Coded:
    """Carry out one decision."""
    tensor = slot.tensor.detach()
    if decision.treatment == "grid":
        assert decision.bits is not None
        return nearest(tensor, decision.bits, slot.view)
    if decision.treatment == "exact":
        return Raw(dtype_name(tensor.dtype)).encode(tensor)
    return Float(decision.treatment).encode(tensor)


@dataclass(frozen=True)
class Guess:
    """What a tensor would take, judged by a few of its rows.

    Args:
        nbytes: about.
        sampled: how many of its numbers were looked at.
    """

    nbytes: float
    sampled: int


def sample_cost(slot: ModelTensor, decision: Decision, rows: int) -> Guess:
    """Judge what a tensor would take by rounding at most `rows` evenly spaced rows of it."""
    tensor = slot.tensor.detach()
    if decision.treatment != "grid" or tensor.numel() == 0:
        width = {"float16": 2, "float32": 4}.get(decision.treatment, tensor.element_size())
        return Guess(tensor.numel() * width, 0)
    assert decision.bits is not None
    view = slot.view
    matrix = view.matrix(tensor)
    chosen = torch.linspace(0, len(matrix) - 1, min(rows, len(matrix))).long()
    part = matrix[chosen]
    sampled = nearest(part, decision.bits, View(tuple(part.shape), (0,) if view.rows else ()))
    return Guess(sampled.nbytes * tensor.numel() / part.numel(), part.numel())
