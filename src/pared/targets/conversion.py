"""A model that is quantized already, for another runtime: what it can hold exactly as it is, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from pared.errors import ConfigError
from pared.formats.groups.grid import GroupGrid, Numbers, representable
from pared.targets.alike import joined
from pared.targets.exact import as_groups, holds
from pared.targets.folders.folder import dtype_of
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Role, Target

_SHOWN: Final = 3  # tensors in a message


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of a quantized model.

    Args:
        names: all its names.
        shape: the source tensor's.
        dtype: the type of its values.
        roles: what it is to a runtime: several where it is tied.
        grid: "rows": a step for each row; a grid of groups; or None: values.
        matrix: the rows and columns of its grid.
        read: "codes" (rows, columns), "step" (rows,) and, where columns have scales, "scale" (columns,); the parts of
            its grid; or "values", of `shape`.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    roles: frozenset[Role]
    grid: GroupGrid | Literal["rows"] | None
    matrix: tuple[int, int]
    read: Callable[[], Mapping[str, Numbers]]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def converted(
    held: Iterable[Held], target: Target, config: Mapping[str, Any], folder: Path | None, provenance: Mapping[str, Any]
) -> Source:
    """What a writer gets.

    Args:
        held: every tensor to write.
        target: the runtime.
        config: the content of config.json.
        folder: where the tokenizer is.
        provenance: how the model was made.

    Raises:
        ConfigError: the runtime has no format that holds a tensor exactly.
    """
    tensors, target = list(held), target.for_model(dtype_of(config))
    by_name = {one.name: one for one in tensors}
    offers = _chosen(tensors, target)

    def read(outline: Outline) -> Mapping[str, Numbers]:
        one, parts = by_name[outline.name], by_name[outline.name].read()
        if one.grid != "rows":
            return parts
        assert outline.offer is not None
        assert isinstance(outline.offer.grid, GroupGrid)
        found = as_groups(parts["codes"], parts["step"], outline.offer.grid, outline.offer.also)
        assert found is not None
        return found

    outlines = [
        Outline(one.name, one.shape, _first(one.roles), offers[one.name], one.dtype, one.names) for one in tensors
    ]
    return Source(outlines, read, config, folder, provenance)


def _first(roles: frozenset[Role]) -> Role:
    order: tuple[Role, ...] = ("table", "head", "linear", "other")
    return next(role for role in order if role in roles)


def _chosen(tensors: Sequence[Held], target: Target) -> dict[str, Offer | None]:
    """The smallest format that holds each tensor exactly, and all that must be like it."""
    groups: dict[str, list[Held]] = {}
    found: dict[str, Offer | None] = {}
    for one in tensors:
        found[one.name] = None
        if one.grid is not None:
            groups.setdefault(joined(one.name, target.alike) or one.name, []).append(one)
    failures: dict[str, str] = {}
    for group in groups.values():
        possible = list(target.offers)
        for one in group:
            fitting, why = _exact(one, target)
            possible = [offer for offer in possible if offer in fitting]
            if not possible:
                failures[one.name] = why or f"has no format in common with {group[0].name}, with which it is joined"
                break
        if possible:
            best = min(reversed(possible), key=lambda offer: sum(offer.nbytes(*one.matrix) for one in group))
            found |= {one.name: best for one in group}
    if failures:
        _refuse(failures, len(tensors), target)
    return found


def _exact(held: Held, target: Target) -> tuple[list[Offer], str]:
    """The formats that hold a tensor exactly; or why there is none."""
    rows, columns = held.matrix
    grids = [offer for offer in target.offers if isinstance(offer.grid, GroupGrid)]
    shaped = [offer for offer in grids if all(offer.takes(role, columns, rows) for role in held.roles)]
    if not any(held.roles <= offer.roles for offer in grids):
        return [], "is of a kind that the runtime keeps in floats, such as embeddings"
    if not shaped:
        widths = " or ".join(str(width) for width in sorted({offer.multiple for offer in grids}))
        return [], f"has {columns} columns; a multiple of {widths} is needed"
    if held.grid != "rows":
        same = [offer for offer in shaped if offer.grid == held.grid]
        if same and (also := same[0].also) is not None and not holds(held.read(), also):
            return [], f"has steps that {also} does not hold, in which the model computes"
        return same, "is on a grid that it does not have"
    parts = held.read()
    if "scale" in parts:
        return [], "has scales of columns, which its formats lack"
    codes, step = parts["codes"], parts["step"]
    exact = [offer for offer in shaped if as_groups(codes, step, _grid(offer), offer.also) is not None]
    if exact or not codes.size:
        return exact or shaped, ""
    low, high = int(codes.min()), int(codes.max())
    widest = max((_grid(offer) for offer in shaped), key=lambda grid: grid.bits)
    if low < widest.low or high > widest.high:
        return [], f"has codes from {low} to {high}; {widest.bits} bits hold {widest.low} to {widest.high}"
    kinds = sorted({offer.also or _grid(offer).step for offer in shaped})
    share = max(float(np.mean(representable(step, kind) == step)) for kind in kinds)
    return [], f"has steps that are not numbers of {' or '.join(kinds)} ({share:.0%} of its rows have such)"


def _grid(offer: Offer) -> GroupGrid:
    assert isinstance(offer.grid, GroupGrid)
    return offer.grid


def _refuse(failures: Mapping[str, str], count: int, target: Target) -> None:
    shown = [f"{name} {why}" for name, why in list(failures.items())[:_SHOWN]]
    more = f"; and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
    raise ConfigError(
        f"{len(failures)} of {count} tensors cannot be held exactly: {'; '.join(shown)}{more}",
        where=f"target {target.name!r}",
        remedy=f"Nothing is rounded a second time, which would cost accuracy unseen. Fit the model for it: "
        f"PostTrainingQuantConfig(target={target.name!r}) chooses among {', '.join(o.name for o in target.offers)} and "
        f"rounds on these very grids. From a float checkpoint, without data: pared compress --target {target.name}.",
    )
