"""What a runtime decides about a model's tensors before anything is measured: which formats each may have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from pared.errors import ConfigError
from pared.fitting.config import PostTrainingQuantConfig, Rule
from pared.fitting.rounding import plan
from pared.formats import dtypes
from pared.formats.coded import Float, Grouped
from pared.formats.views import first_dimension
from pared.model.contents import Contents, Decision, Plan, Stored
from pared.model.roles import Roles, roles_of
from pared.model.tensors import ModelTensor, ModelTensors
from pared.targets.alike import joined
from pared.targets.target import Offer, Target, is_stack

_WHERE: Final = "PostTrainingQuantConfig.rules"
_EIGHT: Final = 8
# Bytes of a runtime's file beside its numbers: of a tensor's entry beside its name, and of everything else but the
# tokenizer (estimates).
_ENTRY: Final = 112
_HEADER: Final = 2048


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors that must have the same format, and the formats that they may have.

    Args:
        tensors: one or more.
        offers: from fine to coarse.
        because: the user's reason, where a rule decides.
    """

    tensors: tuple[ModelTensor, ...]
    offers: tuple[Offer, ...]
    because: str = ""


@dataclass(frozen=True, eq=False)
class Assigned:
    """What a runtime takes of a model.

    Args:
        plan: one decision for each tensor; those in units are still to be made.
        units: the tensors that have a choice.
    """

    plan: Plan
    units: tuple[Unit, ...]


def assigned(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    target: Target,
    whole: ModelTensors[nn.Module] | None = None,
) -> Assigned:
    """Say which formats of a runtime each tensor may have.

    Args:
        tensors: those of the float model.
        conf: the rules; at quant_level 0 nothing is coarser than 8 bits, where there is such a format.
        target: the runtime.
        whole: all tensors of the model, where the first are only some of them. Rules were checked with these.

    Raises:
        ConfigError: a rule matches nothing, asks for what the runtime has not, or for different formats where the
            runtime needs the same; or `conf.strict` and a tensor would stay in float without a rule.
    """
    every = tensors if whole is None else whole
    rules = dict(zip((tensor.name for tensor in every), plan.first_rules(every, conf.rules), strict=True))
    roles = roles_of(tensors)
    usual = plan.make_plan(tensors, (), bits=None, whole=whole)
    groups: dict[str, list[ModelTensor]] = {}
    for tensor, decision in zip(tensors, usual, strict=True):
        if decision.treatment == "grid" and tensor.tensor.dim() >= 2:
            groups.setdefault(joined(tensor.name, target.alike) or tensor.name, []).append(tensor)
    if whole is None:
        _refuse_idle(conf.rules, rules, {tensor.name for group in groups.values() for tensor in group}, target)
    units, why = [], {}
    for group in groups.values():
        rule = _common_rule(group, rules, target)
        offers = _offers(group, roles, target)
        if rule is not None and rule.bits is not None and roles[group[0].name] != {"other"}:
            offers = (_at_most(rule.bits, offers, group, rule, target),)
        elif conf.quant_level == 0:
            offers = tuple(offer for offer in offers if bits_of(offer) >= _EIGHT) or offers[:1]
        if offers and not (rule is not None and rule.keep):
            units.append(Unit(tuple(group), offers, "" if rule is None else rule.because or f"rule {rule.label}"))
            continue
        for tensor in group:
            if rule is not None:
                why[tensor.name] = rule.because or f"rule {rule.label}"
            elif roles[tensor.name] != {"other"}:
                why[tensor.name] = f"{target.name} has no format for {tensor.view.n_columns} columns"
            elif is_stack(tensor.tensor.shape):
                why[tensor.name] = f"{target.name} has no format for stacks of matrices"
    free = {tensor.name for unit in units for tensor in unit.tensors}
    decisions = tuple(
        replace(decision, bits=None, own_grid=False)
        if tensor.name in free
        else _in_float(decision, why.get(tensor.name, ""), rules[tensor.name])
        for tensor, decision in zip(tensors, usual, strict=True)
    )
    if conf.strict:
        pairs = zip(tensors, decisions, strict=True)
        plan.refuse_float((tensor, decision) for tensor, decision in pairs if rules[tensor.name] is None)
    return Assigned(decisions, tuple(units))


def bits_of(offer: Offer) -> int:
    """The bits of a number, without scales."""
    return 8 * dtypes.ITEM_SIZES[offer.grid] if isinstance(offer.grid, str) else offer.grid.bits


def _in_float(decision: Decision, because: str, rule: Rule | None) -> Decision:
    """As it is: what the runtime has no other format for."""
    if decision.treatment in ("exact", "made"):
        return decision
    because = because or (rule.because or f"rule {rule.label}" if rule is not None and rule.keep else "")
    return Decision(decision.name, "exact", None, because)


def _offers(group: Sequence[ModelTensor], roles: Mapping[str, Roles], target: Target) -> tuple[Offer, ...]:
    return tuple(
        offer
        for offer in target.offers
        if all(offer.takes(role, one.view.n_columns, one.view.n_rows) for one in group for role in roles[one.name])
    )


def _common_rule(group: Sequence[ModelTensor], rules: Mapping[str, Rule | None], target: Target) -> Rule | None:
    """The rule of tensors that must be alike.

    Raises:
        ConfigError: their rules differ.
    """
    found = {tensor.name: rules[tensor.name] for tensor in group}
    wanted = {None if rule is None else (rule.bits, rule.keep) for rule in found.values()}
    if len(wanted) > 1:
        name, rule = next((name, rule) for name, rule in found.items() if rule is not None)
        others = [other for other, of_other in found.items() if of_other is not rule]
        raise ConfigError(
            f"{rule.label} decides about {name}, and not about {', '.join(others[:3])}, which must have the same "
            f"format in {target.title}",
            where=_WHERE,
            remedy="Let the rule match all of them, or none.",
        )
    return next(iter(found.values()))


def _at_most(bits: float, offers: Sequence[Offer], group: Sequence[ModelTensor], rule: Rule, target: Target) -> Offer:
    """The finest offer of at most these bits."""
    for offer in offers:
        if bits_of(offer) <= bits:
            return offer
    tensor = group[0]
    known = ", ".join(f"{offer.name} ({_limit(offer)})" for offer in target.offers)
    raise ConfigError(
        f"{target.title} has no format of at most {bits:g} bits for {tensor.name}, which has {tensor.view.n_rows} rows "
        f"and {tensor.view.n_columns} columns",
        where=f"Rule({rule.label})",
        remedy=f"Ask for more bits, or for keep=True. Its formats are: {known}.",
    )


def _limit(offer: Offer) -> str:
    columns = f", columns in multiples of {offer.multiple}" if offer.multiple > 1 else ""
    return f"{bits_of(offer)} bits, {' and '.join(sorted(offer.roles))}{columns}"


def _refuse_idle(
    all_rules: Iterable[Rule], rules: Mapping[str, Rule | None], choosable: set[str], target: Target
) -> None:
    """Refuse a rule with bits that is the first for some tensors, of which none has a choice."""
    for rule in all_rules:
        own = [name for name, first in rules.items() if first is rule]
        if rule.bits is not None and own and not any(name in choosable for name in own):
            raise ConfigError(
                f"no tensor that it matches can have bits={rule.bits:g} in {target.title} ({', '.join(own[:3])})",
                where=f"Rule({rule.label})",
                remedy="Use keep=True, or leave the rule out: they stay as they are.",
            )


def nbytes_at_eight_bits(tensors: ModelTensors[nn.Module], conf: PostTrainingQuantConfig, target: Target) -> int:
    """The size of a runtime's file where nothing is coarser than 8 bits, but by rules.

    Raises:
        ConfigError: as `assigned`.
    """
    found = assigned(tensors, replace(conf, quant_level=0), target)
    total = beside_nbytes(target, [tensor.name for tensor in tensors])
    in_units = {tensor.name for unit in found.units for tensor in unit.tensors}
    total += sum(tensor.tensor.nbytes for tensor in tensors if tensor.name not in in_units and tensor.persistent)
    for unit in found.units:
        views = [tensor.view for tensor in unit.tensors]
        total += min(sum(offer.nbytes(view.n_rows, view.n_columns) for view in views) for offer in unit.offers)
    return total


def target_nbytes(target: Target, contents: Contents) -> int:
    """The size of the runtime's file: exact bytes of its tensors, and about those of everything but its tokenizer."""
    written = [stored for stored in contents.tensors if stored.decision.treatment != "made"]
    return sum(_nbytes(target, stored) for stored in written) + beside_nbytes(target, [one.name for one in written])


def beside_nbytes(target: Target, names: Sequence[str]) -> int:
    """About the bytes of a runtime's file beside the numbers of its tensors, which have these names."""
    return _HEADER + sum(_entries(target, name) for name in names)


def _entries(target: Target, name: str) -> int:
    """About the bytes in which a file lists what a weight becomes in it."""
    return target.parts * (_ENTRY + len(name))


def _nbytes(target: Target, stored: Stored) -> int:
    coded = stored.coded
    offer = offer_of(target, stored)
    if offer is None:
        return sum(part.nbytes for part in coded.parts.values())
    view = coded.view or first_dimension(coded.shape)
    return offer.nbytes(view.n_rows, view.n_columns)


def offer_of(target: Target, stored: Stored) -> Offer | None:
    """The format that a stored tensor has in the runtime's file; None if it stays as it is."""
    coded = stored.coded
    if isinstance(coded.format, Grouped):
        grid = coded.format.grid
        return next(offer for offer in target.offers if offer.grid == grid)
    if isinstance(coded.format, Float) and len(coded.shape) == 2:
        return next((offer for offer in target.offers if offer.grid == coded.format.dtype), None)
    return None
