"""The result of a comparison of two models, as values, as text of 100 columns and as JSON."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pared.inspection.comparison.metrics import Similarity
from pared.inspection.ledger import shape_text
from pared.terminal import Notes, and_more, table, wrapped

_WHOLE: Final = ("int", "uint", "bool")
MOST: Final = 30  # rows of a table by default


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Args:
        name: its path, or the class of a model in memory.
        nbytes: the bytes of its files, or of its tensors in memory.
        tensors: the number of its named tensors.
    """

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class Pair:
    """A tensor that both models have. Of two values the first is that of A, the second that of B.

    Args:
        names: its names.
        shapes: its shapes.
        formats: how its numbers are stored.
        nbytes: its bytes; 0 if it is tied to a tensor with which they are counted.
        similarity: how similar the numbers are; None if they cannot be compared: then `note` says why.
        identical: whether the types and all bits are the same.
        by: how it was matched: by "name", or by "content".
        note: remarks for the reader.
    """

    names: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    formats: tuple[str, str]
    nbytes: tuple[int, int]
    similarity: Similarity | None
    identical: bool = False
    by: str = "name"
    note: str = ""

    @property
    def name(self) -> str:
        """Its name in A."""
        return self.names[0]

    @property
    def ratio(self) -> float:
        """The bytes in B divided by those in A; NaN if A has none."""
        return self.nbytes[1] / self.nbytes[0] if self.nbytes[0] else math.nan

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        data: dict[str, Any] = {
            "name": self.names[0],
            "name_b": self.names[1],
            "matched_by": self.by,
            "shape": list(self.shapes[0]),
            "shape_b": list(self.shapes[1]),
            "format": self.formats[0],
            "format_b": self.formats[1],
            "bytes": self.nbytes[0],
            "bytes_b": self.nbytes[1],
            "ratio": _plain(self.ratio),
            "identical": self.identical,
            "note": self.note,
        }
        return data | _json(self.similarity)


@dataclass(frozen=True)
class Alone:
    """A tensor that only one of the two models has.

    Args:
        name: its name.
        side: the model that has it, "A" or "B".
        shape: its shape.
        format: how its numbers are stored.
        nbytes: its bytes; 0 if it is tied to a tensor with which they are counted.
        note: remarks for the reader.
    """

    name: str
    side: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "format": self.format,
            "bytes": self.nbytes,
            "note": self.note,
        }


@dataclass(frozen=True)
class LayerOutput:
    """The output of a module in both models, over all of its calls.

    Args:
        name: the dotted name of the module; "" for the model itself.
        kind: its class in A.
        calls: the number of its calls.
        similarity: how similar its outputs are; None if they cannot be compared: then `note` says why.
        input: the SQNR of its worst input in dB, over its first calls within each call of the model.
        drop: how much lower the SQNR of its output is than that of its input, in dB, unless modules inside it account
            for most of that.
        note: remarks for the reader.
    """

    name: str
    kind: str
    calls: int
    similarity: Similarity | None
    input: float
    drop: float = 0.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind, "calls": self.calls, "note": self.note}
        return data | {"input_sqnr": _plain(self.input), "drop": _plain(self.drop)} | _json(self.similarity)


@dataclass(frozen=True)
class Comparison:
    """How two models differ.

    Args:
        a: the reference.
        b: the model that was compared with it.
        pairs: the tensors of both: first those that cannot be compared, then by SQNR, the worst first.
        alone: the tensors that only one of them has.
        outputs: how similar the models' outputs are; None if the models were not run.
        layers: the outputs of the modules that both called, in the order in which the modules finish.
        diverges_at: the name of the module at which the outputs diverge; None if they do not, or if the models were
            not run.
    """

    a: Side
    b: Side
    pairs: tuple[Pair, ...]
    alone: tuple[Alone, ...] = ()
    outputs: Similarity | None = None
    layers: tuple[LayerOutput, ...] = ()
    diverges_at: str | None = None

    @property
    def parts(self) -> str | None:
        """The former name of `diverges_at`."""
        return self.diverges_at

    @property
    def weights(self) -> Similarity:
        """How similar all compared tensors are, taken as one; integers, which are not weights, are left out."""
        weights = (p.similarity for p in self.pairs if p.similarity is not None and not p.formats[0].startswith(_WHOLE))
        return functools.reduce(operator.add, weights, Similarity())

    @property
    def identical(self) -> int:
        """The number of tensors with the same type and bits in both."""
        return sum(pair.identical for pair in self.pairs)

    @property
    def equal(self) -> int:
        """The number of tensors with the same values in both, whatever their types."""
        return sum(pair.similarity is not None and pair.similarity.same for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data that is valid JSON: numbers that are not finite are "inf", "-inf" or "nan"."""
        return {
            "a": {"name": self.a.name, "bytes": self.a.nbytes, "tensors": self.a.tensors},
            "b": {"name": self.b.name, "bytes": self.b.nbytes, "tensors": self.b.tensors},
            "ratio": _plain(_ratio(self.a, self.b)),
            "identical": self.identical,
            "equal": self.equal,
            "weights": _json(self.weights),
            "outputs": _json(self.outputs) if self.outputs is not None else None,
            "diverges_at": self.diverges_at,
            "parts": self.diverges_at,  # its former name
            "layers": [layer.to_json() for layer in self.layers],
            "rows": [pair.to_json() for pair in self.pairs],
            "only_in_a": [only.to_json() for only in self.alone if only.side == "A"],
            "only_in_b": [only.to_json() for only in self.alone if only.side == "B"],
        }

    def render(self, most: int = MOST) -> str:
        """The comparison as text of 100 columns.

        Args:
            most: the largest number of rows in each table.
        """
        lines = (*self._totals(), *self._layers(most), *self._pairs(most), *self._alone(most))
        return "\n".join(lines).rstrip("\n")

    def __str__(self) -> str:
        return self.render()

    def _totals(self) -> Iterator[str]:
        for mark, side in (("A", self.a), ("B", self.b)):
            ratio = f", {_ratio(self.a, self.b):.3f} of A" if mark == "B" and self.a.nbytes else ""
            tensors = f"{side.tensors:,} tensor{'' if side.tensors == 1 else 's'}"
            yield from wrapped(f"{mark}  ", f"{side.name}: {side.nbytes:,} bytes{ratio}, {tensors}")
        yield ""
        if self.outputs is not None:
            yield f"outputs   {_words(self.outputs)}"
        if self.layers:
            where = "nowhere: no module adds much to the difference"
            if self.diverges_at is not None:
                layer = next(layer for layer in self.layers if layer.name == self.diverges_at)
                where = f"at {_label(layer)}: {_level(layer.input)} at its input, {_after(layer)} at its output"
            yield from wrapped("diverges  ", where)
        if self.pairs:
            yield f"weights   {_words(self.weights)}"
            yield f"tensors   {self._counts()}"

    def _counts(self) -> str:
        misfits = sum(pair.similarity is None for pair in self.pairs)
        sides = [sum(only.side == side for only in self.alone) for side in "AB"]
        counts = {
            "in both": len(self.pairs),
            "equal": self.equal,
            "of these bit for bit": self.identical,
            "not comparable": misfits,
            "only in A": sides[0],
            "only in B": sides[1],
        }
        always = ("in both", "equal", "of these bit for bit")
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count or what in always)

    def _pairs(self, most: int) -> Iterator[str]:
        shown = [pair for pair in self.pairs if not pair.identical or pair.note or pair.by != "name"][:most]
        if not shown:
            return
        notes = Notes()
        rows = []
        for pair in shown:
            format = " → ".join(dict.fromkeys(pair.formats))
            cells = [pair.name + notes.mark(_note(pair)), format, *(f"{n:,}" for n in pair.nbytes)]
            rows.append([*cells, *_figures(pair.similarity)])
        yield from table(["tensor", "format", "bytes", "bytes in B", "SQNR dB", "max err", "1-cos"], rows)
        yield from notes.lines()
        rest = len(self.pairs) - len(shown)
        equal = self.identical - sum(pair.identical for pair in shown)
        yield from and_more(rest, f"tensors, {equal:,} of them equal bit for bit" if equal else "tensors")

    def _alone(self, most: int) -> Iterator[str]:
        if not self.alone:
            return
        notes = Notes()
        rows = [
            [only.name + notes.mark(only.note), only.side, shape_text(only.shape), only.format, f"{only.nbytes:,}"]
            for only in self.alone[:most]
        ]
        yield from table(["tensor", "only in", "shape", "format", "bytes"], rows)
        yield from notes.lines()
        yield from and_more(len(self.alone) - most, "tensors")

    def _layers(self, most: int) -> Iterator[str]:
        if not self.layers:
            return
        notes = Notes()
        rows = []
        steepest = sorted(self.layers, key=lambda layer: (layer.name != self.diverges_at, -layer.drop))[:most]
        names = {layer.name for layer in steepest}
        shown = [layer for layer in self.layers if layer.name in names]  # in the order of the model
        for layer in shown:
            sqnr, error, apart = _figures(layer.similarity)
            drop = f"{layer.drop:.1f}" if layer.drop >= 1 else ""
            mark = "diverges here" if layer.name == self.diverges_at else ""
            name = _label(layer) + notes.mark(layer.note)
            rows.append([name, layer.kind, f"{layer.calls:,}", sqnr, _decibels(layer.input), drop, error, apart, mark])
        yield from table(["output of", "class", "calls", "SQNR dB", "input", "drop", "max err", "1-cos", ""], rows)
        yield from notes.lines()
        yield from and_more(len(self.layers) - most, "modules, with smaller drops")


def _label(layer: LayerOutput) -> str:
    return layer.name or "(the model)"


def _level(sqnr: float) -> str:
    return _decibels(sqnr) if math.isnan(sqnr) or sqnr == math.inf else f"{sqnr:.1f} dB"


def _after(layer: LayerOutput) -> str:
    return _level(layer.similarity.sqnr) if layer.similarity is not None else layer.note


def _note(pair: Pair) -> str:
    parts = [pair.note]
    if pair.by == "content":
        parts.append(f"matched by content: {pair.names[1]} in B")
    if pair.similarity is None and pair.shapes[0] != pair.shapes[1]:
        parts.append(f"shape {list(pair.shapes[0])} in A, {list(pair.shapes[1])} in B")
    return "; ".join(filter(None, parts))


def _ratio(a: Side, b: Side) -> float:
    return b.nbytes / a.nbytes if a.nbytes else math.nan


def _words(similarity: Similarity) -> str:
    if not similarity.count:
        return "nothing could be compared"
    if similarity.same:
        return "equal"
    if similarity.broken:
        return f"{similarity.broken:,} of {similarity.count:,} numbers are NaN or infinite in A or B, and not alike"
    share = f" ({similarity.relative_error:.2g} of the largest number)" if similarity.largest else ""
    apart = f"no cosine ({similarity.no_angle})" if similarity.no_angle else f"1 - cosine {_apart(similarity)}"
    return f"SQNR {_level(similarity.sqnr)}, {apart}, largest error {similarity.error:.3g}{share}"


def _figures(similarity: Similarity | None) -> tuple[str, str, str]:
    """The SQNR in dB, the largest error, and 1 - cosine, as texts."""
    if similarity is None:
        return "differs", "", ""
    if similarity.same:
        return "equal", "", ""
    return _decibels(similarity.sqnr), f"{similarity.error:.1e}", _apart(similarity)


def _decibels(sqnr: float) -> str:
    return "too large" if math.isnan(sqnr) else "equal" if sqnr == math.inf else f"{sqnr:.1f}"


def _apart(similarity: Similarity) -> str:
    return similarity.no_angle or f"{1 - similarity.cosine:.1e}"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _json(similarity: Similarity | None) -> dict[str, Any]:
    if similarity is None:
        return {"sqnr": None, "max_error": None, "relative_error": None, "cosine": None, "equal": None}
    return {
        "sqnr": _plain(similarity.sqnr),
        "max_error": _plain(similarity.error),
        "relative_error": _plain(similarity.relative_error),
        "cosine": _plain(similarity.cosine),
        "equal": similarity.same,
    }
