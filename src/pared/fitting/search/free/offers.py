"""The options of tensors that a runtime wants alike: its formats, with exact bytes and measured damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pared.allocate import Options
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.curves import row_errors, sample_rows
from pared.fitting.rounding.groups.solve import Parts, round_in_groups, solve_in_groups
from pared.fitting.rounding.importance import make_target
from pared.fitting.rounding.targets import Floats, RoundingTarget
from pared.fitting.search.free.units import Unit
from pared.formats.coded import Coded, Float, Grouped, Raw, dtype_name
from pared.formats.groups.grid import GroupGrid
from pared.model.contents import Decision
from pared.model.tensors import ModelTensor
from pared.targets.target import Offer

_LARGEST: Final = 65504.0  # that float16 holds


@dataclass(frozen=True, eq=False)
class FreeUnit:
    """Tensors whose common format the allocation decides.

    Args:
        unit: the tensors and their formats.
        targets: what is needed to round each.
        damages: float64 (tensors, formats): the damage of each.
        because: what is to be said of each tensor.
    """

    unit: Unit
    targets: tuple[RoundingTarget, ...]
    damages: Floats
    because: tuple[str, ...]

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """See `Free`; so are the other methods."""
        return self.unit.tensors

    @property
    def options(self) -> Options:
        """An option for each format."""
        nbytes = [sum(_nbytes(offer, tensor) for tensor in self.tensors) for offer in self.unit.offers]
        return Options(np.array(nbytes, np.float64), self.damages.sum(0))

    @property
    def held(self) -> tuple[tuple[Coded, ...], float]:
        """The tensors as they are."""
        coded = tuple(Raw(dtype_name(one.tensor.dtype)).encode(one.tensor) for one in self.tensors)
        return coded, sum(one.tensor.nbytes for one in self.tensors)

    def decisions(self, option: int) -> tuple[Decision, ...]:
        """What a format means for each tensor."""
        offer = self.unit.offers[option]
        return tuple(
            _decision(tensor, offer, "; ".join(filter(None, (offer.name, self.unit.because, because))), float(damage))
            for tensor, because, damage in zip(self.tensors, self.because, self.damages[:, option], strict=True)
        )

    def coded(self, option: int) -> tuple[Coded, ...]:
        """Each tensor in a format."""
        offer = self.unit.offers[option]
        return tuple(coded_as(*pair, offer) for pair in zip(self.tensors, self.targets, strict=True))

    def corrected(self, factors: Mapping[str, float]) -> FreeUnit:
        """With other damage."""
        each = np.array([factors.get(tensor.name, 1.0) for tensor in self.tensors])
        return replace(self, damages=self.damages * each[:, None]) if bool((each != 1).any()) else self


def trace_unit(unit: Unit, stats: Mapping[str, TensorStats], reason: Callable[[ModelTensor], str]) -> FreeUnit:
    """What tensors could become.

    Args:
        unit: the tensors and their formats.
        stats: what errors of them cost, by their names.
        reason: what is to be said of a tensor.
    """
    if any(float(tensor.tensor.detach().abs().max()) > _LARGEST for tensor in unit.tensors):
        offers = tuple(offer for offer in unit.offers if offer.grid != "float16") or unit.offers
        unit = replace(unit, offers=offers)
    targets, damages = [], []
    for tensor in unit.tensors:
        own = stats[tensor.name]
        matrix = tensor.view.matrix(tensor.tensor.detach().float()).contiguous()
        target = make_target(matrix, tensor.view, own, whole=True)  # groups of columns need not fit into blocks
        damages.append(_damages(target, unit.offers, own.judge))
        targets.append(replace(target, judged=None))
    return FreeUnit(unit, tuple(targets), np.array(damages), tuple(map(reason, unit.tensors)))


def _damages(target: RoundingTarget, offers: tuple[Offer, ...], judge: Tensor | None) -> list[float]:
    """The damage in each format, from rounding a few rows with a factor from one half of the calls.

    Rows that are not rounded are taken to lose the same share of what counts in them.
    """
    sampled = replace(target, factored=target.judged)
    rows = sample_rows(sampled)
    energy = target.importance * target.matrix.square().double().mean(1)
    total, of_sample = float(energy.sum()), float(energy[rows.reshape(-1)].sum())
    weight = target.importance[rows]
    found = []
    for offer in offers:
        if isinstance(offer.grid, str):
            rounded = Float(offer.grid).encode(target.matrix).decode()
            error = (target.matrix - rounded).square().double().mean(1)
            found.append(float((target.importance * error).sum()))
            continue
        parts = round_in_groups(sampled, rows, offer.grid, negative=offer.negative, also=offer.also)
        errors = row_errors(sampled, rows, torch.from_numpy(offer.grid.decode(parts)), judge)
        found.append(float((weight * errors).sum()) * (total / of_sample if of_sample > 0 else 1.0))
    return found


def _decision(tensor: ModelTensor, offer: Offer, because: str, damage: float) -> Decision:
    if isinstance(offer.grid, str):
        return Decision(tensor.name, offer.grid, None, because, damage)
    bits = 8 * _nbytes(offer, tensor) / tensor.tensor.numel()
    return Decision(tensor.name, "grid", round(bits, 3), because, damage)


def _nbytes(offer: Offer, tensor: ModelTensor) -> int:
    return offer.nbytes(tensor.view.n_rows, tensor.view.n_columns)


def coded_as(model_tensor: ModelTensor, target: RoundingTarget, offer: Offer) -> Coded:
    """Round a tensor to a format."""
    tensor = model_tensor.tensor.detach()
    if isinstance(offer.grid, str):
        return Float(offer.grid).encode(tensor)
    parts = solve_in_groups(target, offer.grid, negative=offer.negative, also=offer.also)
    return grouped(tensor, target, offer.grid, parts)


def grouped(tensor: Tensor, target: RoundingTarget, grid: GroupGrid, parts: Parts) -> Coded:
    """A tensor on a grid of groups, whose numbers are given for its matrix."""
    codes = target.view.restore(torch.from_numpy(parts["codes"]), tuple(tensor.shape)).contiguous()
    others = {name: torch.from_numpy(part) for name, part in parts.items()}
    return Coded(Grouped(grid), tuple(tensor.shape), tensor.dtype, {**others, "codes": codes}, target.view)
