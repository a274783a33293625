"""What errors of experts cost, where calibration reached some of them far less than others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import blocks_of
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.experts.finding import Mixture
from pared.model.tensors import ModelTensor, ModelTensors

# Of how many tokens the layer's own moments count, for each column of a weight's matrix (decision 049).
PRIOR: Final = 0.1


def balanced(
    sensitivity: Sensitivity,
    tensors: ModelTensors[nn.Module],
    found: Sequence[Mixture],
    tokens: Mapping[str, Tensor],
    prior: float = PRIOR,
) -> Sensitivity:
    """The same, where experts that got few tokens lean on what all experts of their layer got.

    With H_e the second moments of an expert for each of its n_e tokens, and H those of all together, an expert is
    rounded with (n_e H_e + k H) / (n_e + k). An error of an expert counts at least like one of the layer's median
    expert, so that no step is coarser than that one's: it may be used more on other texts.

    Args:
        sensitivity: what errors cost; its moments are sums over tokens.
        tensors: those of the model, with the groups that calibration showed.
        found: its mixtures.
        tokens: how many tokens each expert got, float64 (experts,), by the mixture's name; those of others stay.
        prior: k, for each column of the weight's matrix.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    known = dict(sensitivity.tensors)
    for mixture in found:
        counts = tokens.get(mixture.name)
        if counts is None or not bool((counts > 0).any()):
            continue
        for names in mixture.tensors:
            own = [by_name[name] for name in names]
            before = [known.get(name) for name in names]
            known |= dict(zip(names, _of_kind(own, before, counts, prior), strict=False))
    return replace(sensitivity, tensors=known)


@dataclass(frozen=True, eq=False)
class _Sums:
    """What is known of one kind of weight of all experts.

    Args:
        rows: float64 (experts, rows of each), see `TensorStats`.
        moments: float32 (experts, blocks of each, columns, columns); None where they were not measured.
        unseen: likewise.
    """

    rows: Tensor
    moments: Tensor | None
    unseen: Tensor | None


def _of_kind(
    own: Sequence[ModelTensor], before: Sequence[TensorStats | None], counts: Tensor, prior: float
) -> list[TensorStats]:
    """The statistics of one kind of weight: of a stack, or of each expert in turn; none if nothing is known of any."""
    sums = _gathered(own, before, len(counts))
    if sums is None:
        return []
    reached = (sums.rows > 0).any(1) & (counts > 0)
    if not bool(reached.any()):
        return []
    rows = _at_least_the_median(sums.rows, reached)
    k = prior * own[0].view.n_columns
    moments, unseen = (_leaning(part, counts, k) for part in (sums.moments, sums.unseen))
    if len(own) == 1:
        assert before[0] is not None
        flat = [None if part is None else part.flatten(0, 1) for part in (moments, unseen)]
        return [replace(before[0], rows=rows.reshape(-1), moments=flat[0], unseen=flat[1], tokens=counts)]
    return [
        replace(
            stats or TensorStats(rows[i], layout=blocks_of(tensor)),
            rows=rows[i],
            moments=None if moments is None else moments[i],
            unseen=None if unseen is None else unseen[i],
            tokens=counts[i : i + 1],
        )
        for i, (tensor, stats) in enumerate(zip(own, before, strict=True))
    ]


def _gathered(own: Sequence[ModelTensor], before: Sequence[TensorStats | None], count: int) -> _Sums | None:
    """What is known of all experts together; None if that is nothing, or not of each expert apart."""
    if len(own) == 1:
        stats = before[0]
        if stats is None or (own[0].groups or 1) != count:
            return None
        split = [None if part is None else part.unflatten(0, (count, -1)) for part in (stats.moments, stats.unseen)]
        return _Sums(stats.rows.reshape(count, -1), split[0], split[1])
    first = next((stats for stats in before if stats is not None), None)
    if first is None:
        return None

    def together(parts: Sequence[Tensor | None], like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])

    def of(stats: TensorStats | None, part: str) -> Tensor | None:
        value: Tensor | None = None if stats is None else getattr(stats, part)
        return value

    columns = {part: [of(stats, part) for stats in before] for part in ("rows", "moments", "unseen")}
    any_of = {part: next((one for one in values if one is not None), None) for part, values in columns.items()}
    rows = together(columns["rows"], any_of["rows"])
    assert rows is not None
    # An expert of one half of the samples only has no unseen part; all of its moments stand in for that.
    whole = [u if u is not None else m for u, m in zip(columns["unseen"], columns["moments"], strict=True)]
    unseen = together(whole, any_of["unseen"])
    return _Sums(rows, together(columns["moments"], any_of["moments"]), unseen)


def _at_least_the_median(rows: Tensor, reached: Tensor) -> Tensor:
    """The importance of each row, float64 (experts, rows), where each expert counts like the median one or more.

    Steps follow the logarithm of the importance, so an expert's level is the mean of it.
    """
    floor = rows[reached].clamp(min=float(rows[reached].mean()) * 1e-6)
    levels = floor.log().mean(1)
    middle = levels.median()
    raised = rows.clone()
    raised[reached] = floor * (middle - levels).clamp(min=0).exp()[:, None]
    raised[~reached] = middle.exp()
    return raised


def _leaning(sums: Tensor | None, counts: Tensor, k: float) -> Tensor | None:
    """Sums of moments, (experts, blocks, columns, columns), with those of k tokens of the whole layer added."""
    if sums is None:
        return None
    shared = sums.sum(0) / float(counts.sum())
    return sums + k * shared
