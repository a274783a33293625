"""The formats of stored numbers: on a grid, as floats, or exactly as they came.

A `Format` is data. Its `encode` turns a tensor into a `Coded`: the numbers that are kept in memory and on disk, by part
("codes" and "step", or "values"). Laws that hold for every format, and that the tests check for each:

* `encode(w).decode()` has the dtype and the shape of `w`, and is as near to it as the format promises;
* `coded.nbytes` is exactly the number of bytes in `format.streams(coded)`, before the container's alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.errors import CorruptError
from pared.formats import dtypes, grids
from pared.formats.encoded.codes import Undecoded
from pared.formats.exact_grids import find_exact_grid, whole_grid
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.groups import search, stored
from pared.formats.groups.decoding import decoded
from pared.formats.groups.grid import GroupGrid
from pared.formats.streams import STEPS, EncodedPart, ceiling, decode_grid, encode_codes, encode_steps
from pared.formats.views import View, first_dimension


@final
@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor in a format.

    Args:
        format: how its numbers are stored.
        shape: the source tensor's.
        dtype: the source tensor's; `decode` gives it back.
        parts: "codes" (int8 or int16, of `shape`) and "step" (float32, of the view's `row_sizes`), where columns have
            scales also "scale" (float32, of the sizes of the view's columns); or "values". With groups, "codes" of
            `shape` and the other parts of `GroupGrid.shapes`.
        view: which dimensions are rows; only for grids. Default: the first.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]
    view: View | None = None

    def decode(self) -> Tensor:
        """Compute the tensor that the numbers stand for, in the source's dtype and shape."""
        return self.format.decode(self)

    @property
    def nbytes(self) -> int:
        """The size of its streams in bytes. Of a grid this takes as long as writing them."""
        if "values" in self.parts:
            return self.parts["values"].nbytes
        return sum(len(part.payload) for part in self.format.streams(self).values())


@final
@dataclass(frozen=True)
class Grid:
    """Integer codes on a uniform grid with one step per row: `value = step[row] * code`, or times `scale[column]`.

    Args:
        codes: the integer type of the codes; magnitudes stay within 127 or 32767, so that the grid is symmetric.
        scaled: whether each column has a scale.

    >>> w = torch.tensor([[0.5, -1.0], [0.0, 0.0]])
    >>> coded = Grid("int8").encode(w, torch.tensor([0.5, 0.0]))
    >>> coded.parts["codes"].tolist(), coded.decode().tolist()
    ([[1, -2], [0, 0]], [[0.5, -1.0], [0.0, 0.0]])
    """

    tag: ClassVar[str] = "grid"
    codes: CodeType = "int8"
    scaled: bool = False

    @property
    def limit(self) -> int:
        """The largest magnitude of a code."""
        return CODE_LIMITS[self.codes]

    @property
    def label(self) -> str:
        """A short name for tables."""
        return f"grid {self.codes}, scaled" if self.scaled else f"grid {self.codes}"

    def encode(self, tensor: Tensor, step: Tensor, view: View | None = None, scale: Tensor | None = None) -> Coded:
        """Round every value to the nearest multiple of its row's step; codes beyond the limit are clamped.

        Args:
            tensor: any floating dtype and any shape; finite.
            step: float32 of shape `view.row_sizes`; a step of zero is legal and gives zeros.
            view: which dimensions are rows; default: the first.
            scale: float32 of shape `view.across.row_sizes`, all above 0, where the grid is scaled.
        """
        shape = tuple(tensor.shape)
        view = view or first_dimension(shape)
        matrix = _plain(view.matrix(tensor.detach().float()))
        parts = {"step": step}
        if scale is not None:
            matrix, parts["scale"] = matrix / _plain(scale).reshape(-1), scale
        rows = torch.from_numpy(grids.encode(matrix, _plain(step).reshape(-1), self.codes))
        codes = view.restore(rows, shape).contiguous().to(tensor.device)
        return Coded(self, shape, tensor.dtype, {"codes": codes, **parts}, view)

    def decode(self, coded: Coded) -> Tensor:
        """`step[row] * code`, times `scale[column]`, each product in float32, then in the source's dtype."""
        view = coded.view or first_dimension(coded.shape)
        codes, step = coded.parts["codes"], coded.parts["step"]
        # Not `grids.decode`: graphs are captured, and functions transformed, through here.
        values = codes.reshape(view.split).to(torch.float32).mul_(view.spread(step))  # mixed types are slower
        if self.scaled:
            values.mul_(view.across.spread(coded.parts["scale"]))
        return values.to(coded.dtype).reshape(coded.shape)

    def streams(self, coded: Coded) -> dict[str, EncodedPart]:
        """The bytes to store, by part: codes, by classes of rows (scaled: of columns) where that pays, and steps."""
        view = coded.view or first_dimension(coded.shape)
        if isinstance(coded.parts, Undecoded):
            found = dict(coded.parts.codes.streams)
        else:
            found = encode_codes(_plain(coded.parts["codes"]), view.across if self.scaled else view)
        return found | {name: encode_steps(_plain(coded.parts[name])) for name in STEPS if name in coded.parts}

    def parts(self, streams: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View | None) -> dict[str, Tensor]:
        """Codes and steps from their bytes, whose lengths must be exactly right.

        Raises:
            CorruptError: they are not, or a step is negative or not finite.
        """
        view = view or first_dimension(shape)
        numbers = decode_grid(streams, shape, view, self.codes, scaled=self.scaled)
        sizes = {"codes": shape, "step": view.row_sizes, "scale": view.across.row_sizes}
        return {name: torch.from_numpy(part).reshape(sizes[name]) for name, part in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """The format as it stands in an artifact's index."""
        return {"tag": self.tag, "codes": self.codes} | ({"scaled": True} if self.scaled else {})


@final
@dataclass(frozen=True)
class Grouped:
    """Integer codes on a grid with a step for each group of columns.

    Args:
        grid: the groups, and what belongs to each.

    >>> coded = Grouped(GroupGrid(4, 2)).encode(torch.tensor([[1.0, -2.0, 3.0]]), {"step": torch.tensor([[0.5, 1.0]])})
    >>> coded.parts["codes"].tolist(), coded.decode().tolist()
    ([[2, -4, 3]], [[1.0, -2.0, 3.0]])
    """

    tag: ClassVar[str] = GroupGrid.tag
    grid: GroupGrid

    @property
    def label(self) -> str:
        """A short name for tables."""
        return self.grid.label

    def encode(self, tensor: Tensor, parts: Mapping[str, Tensor] | None = None, view: View | None = None) -> Coded:
        """Round every value to the nearest that its group has.

        Args:
            tensor: any floating dtype and any shape; finite.
            parts: all parts but "codes", as `GroupGrid.shapes` has them; default: those of least squared error.
            view: which dimensions are rows; default: the first.
        """
        shape = tuple(tensor.shape)
        view = view or first_dimension(shape)
        matrix = _plain(view.matrix(tensor.detach().float()))
        if parts is None:
            found = search.fitted(matrix, self.grid)
        else:
            found = {name: _plain(part) for name, part in parts.items() if name != "codes"}
        rows = torch.from_numpy(search.nearest(matrix, self.grid, found))
        codes = view.restore(rows, shape).contiguous()
        numbers = {"codes": codes} | {name: torch.from_numpy(part) for name, part in found.items()}
        return Coded(self, shape, tensor.dtype, {k: part.to(tensor.device) for k, part in numbers.items()}, view)

    def decode(self, coded: Coded) -> Tensor:
        """What `GroupGrid.decode` gives, in the source's dtype."""
        view = coded.view or first_dimension(coded.shape)
        values = decoded(self.grid, view.matrix(coded.parts["codes"]), coded.parts)
        return view.restore(values.to(coded.dtype), coded.shape)

    def streams(self, coded: Coded) -> dict[str, EncodedPart]:
        """The bytes to store, by part."""
        arrays = {name: _plain(part) for name, part in coded.parts.items()}
        return stored.streams(self.grid, arrays, coded.view or first_dimension(coded.shape))

    def parts(self, streams: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View | None) -> dict[str, Tensor]:
        """Codes and all else from their bytes.

        Raises:
            CorruptError: a part has the wrong length, or numbers that the grid does not have.
        """
        found = stored.parts(self.grid, streams, shape, view or first_dimension(shape))
        return {name: torch.from_numpy(part) for name, part in found.items()}

    def to_json(self) -> dict[str, Any]:
        """The format as it stands in an artifact's index."""
        return self.grid.to_json()


class _Plain:
    """A format with one part, "values": plain little-endian numbers of one type."""

    dtype: str

    def parts(
        self, streams: Mapping[str, EncodedPart], shape: tuple[int, ...], _view: View | None
    ) -> dict[str, Tensor]:
        """The values from their bytes."""
        return {"values": _from_bytes(streams["values"].payload, RAW_TYPES[self.dtype], shape)}

    def streams(self, coded: Coded) -> dict[str, EncodedPart]:
        """The values' bytes."""
        return {"values": EncodedPart(_to_bytes(coded.parts["values"]))}

    def decode(self, coded: Coded) -> Tensor:
        """The values in the source's dtype."""
        return coded.parts["values"].to(coded.dtype)


@final
@dataclass(frozen=True)
class Float(_Plain):
    """Floating-point numbers, possibly narrower than the source's.

    >>> Float("bfloat16").encode(torch.ones(3)).nbytes
    6
    """

    tag: ClassVar[str] = "float"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @property
    def label(self) -> str:
        """A short name for tables."""
        return self.dtype

    def encode(self, tensor: Tensor) -> Coded:
        """Round every value to the nearest one that the type holds."""
        values = tensor.detach().to(RAW_TYPES[self.dtype])
        return Coded(self, tuple(tensor.shape), tensor.dtype, {"values": values})

    def to_json(self) -> dict[str, str]:
        """The format as it stands in an artifact's index."""
        return {"tag": self.tag, "dtype": self.dtype}


@final
@dataclass(frozen=True)
class Raw(_Plain):
    """Exactly the source's numbers, of any type.

    Args:
        dtype: the name of the source's type, "int64" for instance.

    >>> Raw("int64").encode(torch.arange(3)).decode().tolist()
    [0, 1, 2]
    """

    tag: ClassVar[str] = "raw"
    dtype: str

    @property
    def label(self) -> str:
        """A short name for tables."""
        return self.dtype

    def encode(self, tensor: Tensor) -> Coded:
        """Keep every value."""
        values = tensor.detach().resolve_conj().resolve_neg().contiguous()
        return Coded(self, tuple(tensor.shape), tensor.dtype, {"values": values})

    def to_json(self) -> dict[str, str]:
        """The format as it stands in an artifact's index, where the entry says the dtype."""
        return {"tag": self.tag}


Format = Grid | Grouped | Float | Raw

# The element types that an artifact may hold.
RAW_TYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in dtypes.ITEM_SIZES}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that an artifact uses for a type: "float32"."""
    return str(dtype).removeprefix("torch.")


def from_json(data: Mapping[str, Any], dtype: str) -> Format:
    """The format of an index entry that has been checked, whose element type is `dtype`.

    >>> from_json({"tag": "grid", "codes": "int8"}, "float32")
    Grid(codes='int8', scaled=False)
    """
    fields: dict[str, Any] = {key: value for key, value in data.items() if key != "tag"}
    if data["tag"] == Grouped.tag:
        return Grouped(GroupGrid(**fields))
    if data["tag"] == Raw.tag:
        fields["dtype"] = dtype
    return FORMATS[data["tag"]](**fields)


def survives_float16(tensor: Tensor) -> bool:
    """Whether every value, put into float16, comes back with a relative error of at most 2^-11.

    >>> survives_float16(torch.tensor([0.1, 0.0, -3.0])), survives_float16(torch.tensor([1e-9]))
    (True, False)
    """
    return dtypes.survives_float16(to_array(tensor.detach().cpu()))


def on_own_grid(tensor: Tensor) -> Coded | None:
    """A tensor on the grid that all of its numbers lie on already: smaller than floats, and exact.

    Args:
        tensor: floating, of any shape; finite.

    Returns:
        None if there is no such grid, or if it would need codes beyond 16 bits.

    >>> coded = on_own_grid(torch.tensor([[0.5, -1.0, 3.5], [0.0, 0.25, 0.75]]))
    >>> coded.parts["codes"].tolist(), coded.decode().tolist()
    ([[1, -2, 7], [0, 1, 3]], [[0.5, -1.0, 3.5], [0.0, 0.25, 0.75]])
    """
    array = to_array(tensor)
    found = find_exact_grid(array, bits=16) if array.ndim > 1 else None
    found = found or whole_grid(array)
    if found is None:
        return None
    view = found.view
    parts = {
        "codes": torch.from_numpy(found.codes),
        "step": torch.from_numpy(found.step).reshape(view.row_sizes),
    }
    kind: CodeType = "int8" if found.codes.itemsize == 1 else "int16"
    return Coded(Grid(kind), tuple(tensor.shape), tensor.dtype, parts, view)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a floating tensor as an array of the same type, which shares its memory where that is possible."""
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
        return _plain(tensor.detach().view(torch.int16)).view(dtypes.ELEMENTS["bfloat16"])
    return _plain(tensor)


def log_step(step: Tensor) -> Tensor:
    """Raise each step to the next 2^(k / 8) with an integer k. Such steps take at most a byte in a file.

    Args:
        step: float32 of any shape, not negative. Zero stays zero; other steps become at least 2^-126, the smallest
            normal number.

    Returns:
        float32 of the same shape: the least 2^(k / 8), as a fixed table rounds it, that is not below the step.

    Raises:
        ParedError: a step is negative, NaN or above 3.12e38, the largest step of that form.

    >>> log_step(torch.tensor([1.0, 1.05, 0.51, 0.0])).tolist()
    [1.0, 1.0905077457427979, 0.5452538728713989, 0.0]
    """
    return torch.from_numpy(ceiling(_plain(step))).reshape(step.shape)


FORMATS: Final[dict[str, type[Format]]] = {cls.tag: cls for cls in (Grid, Grouped, Float, Raw)}


def _plain(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()


def _to_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _from_bytes(payload: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise CorruptError(
            f"a part holds {len(payload)} bytes where its shape {list(shape)} needs {expected}",
        )
    if expected == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(payload), dtype=dtype).reshape(shape)
