"""Buffers that no state dict holds: which of them a constructor computes, so that files can leave them out.

A table that code computes (positions, masks, windows) follows from its neighbours: it compresses to little, or obeys a
linear recurrence, as polynomials, exponentials and sinusoids do. Random numbers and measured ones do not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pared.errors import MismatchError
from pared.formats.coded import dtype_name
from pared.model.tensors import ModelTensors

# Smaller tables are stored, so that a model on the meta device can be loaded into: up to these bytes, or this share of
# the bytes of all tensors in the state dict.
_SMALL: Final = 4096
_SMALL_SHARE: Final = 1e-3
# Numbers that are looked at, and columns of them.
_NUMBERS: Final = 1 << 20
_COLUMNS: Final = 64
_ORDER: Final = 3  # of the recurrence: a constant and a sinusoid
_LEAST_ROWS: Final = 16
_UNEXPLAINED: Final = 2e-5  # share of the variance
_ROUNDING: Final = 1e-9  # share of the energy that counts as well: differences of large float32 numbers are rounded
_COMPRESSED: Final = 0.5  # of what a code for independent numbers would take
_LEVELS: Final = 64  # distinct values of a table of levels, such as a mask

_SAMPLED: Final = 16  # numbers of a table that is left out are kept, to compare with
_TOLERANCE: Final = 1e-3  # of the largest of them: sines differ in the last bits between machines


@dataclass(frozen=True)
class Made:
    """A buffer that an artifact leaves to the constructor of its class.

    Args:
        names: all its names.
        dtype: its element type.
        shape: the shape that it had; a forward may have lengthened it.
        sample: some of its numbers, evenly spaced, as pairs for complex ones; what is not finite is None.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    sample: tuple[float | None, ...]


def left_to_constructor(tensors: ModelTensors[nn.Module]) -> frozenset[str]:
    """The first names of the buffers that an artifact leaves to the constructor: large, in no state dict, computed."""
    nbytes = sum(one.tensor.nbytes for one in tensors if one.persistent)
    small = max(_SMALL, _SMALL_SHARE * nbytes)
    return frozenset(
        one.name
        for one in tensors
        if not one.persistent and not one.tensor.is_meta and one.tensor.nbytes > small and is_computed(one.tensor)
    )


def made(names: tuple[str, ...], tensor: Tensor) -> Made:
    """What is kept of a buffer that is left out."""
    return Made(names, dtype_name(tensor.dtype), tuple(tensor.shape), _sample(tensor))


def check_made(stored: Made, tensor: Tensor) -> None:
    """Compare a buffer of the model that is loaded into with what the artifact keeps of it.

    Raises:
        MismatchError: it is another one. One of another length is not compared: it grows when it is used.
    """
    if tensor.is_meta:
        raise MismatchError(
            "is on the meta device, and the artifact leaves it to the constructor: it is a large table that is in no "
            "state dict",
            where=stored.names[0],
            remedy="Build the model on the CPU, or at least this buffer.",
        )
    if tuple(tensor.shape) != stored.shape:
        return
    ours, theirs = _sample(tensor), stored.sample
    scale = max((abs(one) for one in theirs if one is not None), default=0.0)
    same = len(ours) == len(theirs) and all(
        a == b if a is None or b is None else abs(a - b) <= _TOLERANCE * scale
        for a, b in zip(ours, theirs, strict=True)
    )
    if not same or dtype_name(tensor.dtype) != stored.dtype:
        raise MismatchError(
            "the model's constructor gives this table other numbers than the compressed model had, and the artifact "
            "does not hold it",
            where=stored.names[0],
            remedy="Build the model with the configuration that the artifact was made from. If the buffer was set "
            "after that: set it before you load, or register it with persistent=True and compress again.",
        )


def _sample(tensor: Tensor) -> tuple[float | None, ...]:
    flat = tensor.detach().reshape(-1)
    if not len(flat):
        return ()
    places = np.unique(np.linspace(0, len(flat) - 1, _SAMPLED).astype(np.int64))
    some = flat[torch.from_numpy(places)].cpu()
    numbers = torch.view_as_real(some.to(torch.complex128)).reshape(-1) if some.is_complex() else some.double()
    return tuple(float(one) if bool(torch.isfinite(one)) else None for one in numbers)


def is_computed(tensor: Tensor) -> bool:
    """Whether a table follows from few numbers, so that its constructor computes it.

    >>> positions = torch.arange(256.0)[:, None] * torch.exp(-torch.arange(32) / 4.0)
    >>> is_computed(positions.sin()), is_computed(torch.tril(torch.ones(64, 64)))
    (True, True)
    >>> is_computed(torch.randn(256, 32)), is_computed(torch.randperm(4096))
    (False, False)
    """
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # the 8-bit types can hardly be computed with
    if not tensor.numel():
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    levels = _levels(tensor)
    if levels is not None and _is_repetitive(levels):
        return True
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        return False
    table = tensor.double().numpy()
    return any(_is_recurrent(table, axis) for axis in range(table.ndim) if table.shape[axis] >= _LEAST_ROWS)


def _levels(tensor: Tensor) -> NDArray[Any] | None:
    """A table of integers, or of a few distinct values, as integers."""
    flat = tensor.reshape(-1)[:_NUMBERS]
    if not tensor.is_floating_point():
        return flat.to(torch.int64).numpy()
    if bool((flat == flat.round()).all()) and bool((flat.abs() < 2**31).all()):
        return flat.to(torch.int64).numpy()
    distinct, codes = np.unique(flat.double().numpy(), return_inverse=True)
    return codes if len(distinct) <= _LEVELS else None


def _is_repetitive(levels: NDArray[Any]) -> bool:
    """Whether integers, or their differences, compress to much less than independent ones would."""
    counts = np.unique(levels, return_counts=True)[1]
    independent = -float((counts * np.log2(counts / len(levels))).sum()) / 8
    return any(
        len(zlib.compress(_narrow(one), 6)) <= _COMPRESSED * independent + 64 for one in (levels, np.diff(levels))
    )


def _narrow(values: NDArray[Any]) -> bytes:
    low = int(values.min()) if len(values) else 0
    span = int(values.max()) - low if len(values) else 0
    return (values - low).astype(np.min_scalar_type(span)).tobytes()


def _is_recurrent(table: NDArray[np.float64], axis: int) -> bool:
    """Whether numbers along an axis are a fixed combination of the few before them, in each column on its own."""
    columns = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
    columns = columns[: _NUMBERS // _COLUMNS, :: max(1, columns.shape[1] // _COLUMNS)]
    energy = rest = 0.0
    for column in columns.T:
        before = np.stack([column[i : len(column) - _ORDER + i] for i in range(_ORDER)], 1)
        after = column[_ORDER:]
        errors = min((_errors(before, after, part) for part in _halves(len(after))), key=lambda found: found.sum())
        # About the mean: measured numbers far from zero are nearly a constant, and still no table.
        energy += float(np.square(after - after.mean()).sum()) + _ROUNDING * float(np.square(after).sum())
        rest += float(errors.sum())
    return rest <= _UNEXPLAINED * energy


def _halves(count: int) -> tuple[slice, slice]:
    return slice(0, count // 2), slice(count // 2, count)


def _errors(before: NDArray[np.float64], after: NDArray[np.float64], part: slice) -> NDArray[np.float64]:
    """The squared errors of a combination that a part gives, without the largest: a row may be an exception."""
    weights = np.linalg.lstsq(before[part], after[part], rcond=None)[0]
    errors = np.sort(np.square(after - before @ weights))
    kept: NDArray[np.float64] = errors[: len(errors) - max(_ORDER + 1, len(errors) // 100)]
    return kept


def to_json(one: Made) -> dict[str, Any]:
    """What an index says of a buffer that is left out."""
    return {"names": list(one.names), "dtype": one.dtype, "shape": list(one.shape), "sample": list(one.sample)}


def from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Made, ...]:
    """The inverse of `to_json`, of an index that has been checked."""
    return tuple(Made(tuple(one["names"]), one["dtype"], tuple(one["shape"]), tuple(one["sample"])) for one in values)
