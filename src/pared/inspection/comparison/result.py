"""What a comparison of two models found, as values, as text of 100 columns and as JSON."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pared.inspection.comparison.metrics import Similarity
from pared.terminal import Notes, add_row, and_more, drawn, new_table, wrapped

_WHOLE: Final = ("int", "uint", "bool")
MOST: Final = 30  # rows of a table, unless asked for more


@dataclass(frozen=True)
class Side:
    """One of the two that were compared.

    Args:
        name: the path, or the class of a model.
        nbytes: of the file or files, or of the model's tensors.
        tensors: how many it has, by name.
    """

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class Pair:
    """A tensor that both have; of two values the first is that of A.

    Args:
        names: in each.
        shapes: in each.
        formats: how its numbers are stored in each.
        nbytes: that it takes in each; 0 where it is tied to a tensor that counts them.
        similarity: of the numbers; None where they cannot be compared, and `note` says why.
        identical: whether type and bits are the same.
        by: "name", or "content" where nothing but the numbers says that it is one tensor.
        note: what else there is to know.
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
        """In A."""
        return self.names[0]

    @property
    def ratio(self) -> float:
        """The bytes in B for each byte in A; NaN where A has none."""
        return self.nbytes[1] / self.nbytes[0] if self.nbytes[0] else math.nan

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {
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
        return found | _json(self.similarity)


@dataclass(frozen=True)
class Alone:
    """A tensor that only one of the two has.

    Args:
        name: of the tensor.
        side: "A" or "B".
        shape, format, nbytes: as there.
        note: what else there is to know.
    """

    name: str
    side: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
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
        name: dotted; "" is the model itself.
        kind: the module's class in A.
        calls: how often it was called.
        similarity: of its output; None where outputs cannot be compared, and `note` says why.
        input: the SQNR of what it was given, in dB: of the worst of its inputs, at its first call within each call of
            the model.
        drop: by how many dB its output is worse than its input, as far as no module in it is to blame.
        note: what else there is to know.
    """

    name: str
    kind: str
    calls: int
    similarity: Similarity | None
    input: float
    drop: float = 0.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind, "calls": self.calls, "note": self.note}
        return found | {"input_sqnr": _plain(self.input), "drop": _plain(self.drop)} | _json(self.similarity)


@dataclass(frozen=True)
class Comparison:
    """How two models differ.

    Args:
        a: the first, to which the second is compared.
        b: the second.
        pairs: the tensors of both: those that cannot be compared, then by SQNR, the worst first.
        alone: the tensors of one of them.
        outputs: how alike the models' outputs are; None where they were not run.
        layers: of each module that both called its output, in the order in which they finish.
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
        """Of all tensors that were compared, as if they were one; whole numbers, which are no weights, left out."""
        found = (p.similarity for p in self.pairs if p.similarity is not None and not p.formats[0].startswith(_WHOLE))
        return functools.reduce(operator.add, found, Similarity())

    @property
    def identical(self) -> int:
        """How many tensors have the same type and bits in both."""
        return sum(pair.identical for pair in self.pairs)

    @property
    def equal(self) -> int:
        """How many tensors have the same values in both, whatever their types."""
        return sum(pair.similarity is not None and pair.similarity.same for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """The same facts as plain data, that is valid JSON.

        Ratios in dB and errors that are no finite number are the strings "inf", "-inf" and "nan".
        """
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
            "only_in_a": [one.to_json() for one in self.alone if one.side == "A"],
            "only_in_b": [one.to_json() for one in self.alone if one.side == "B"],
        }

    def render(self, most: int = MOST) -> str:
        """The comparison as text of 100 columns.

        Args:
            most: rows of each table.
        """
        lines = (*self._totals(), *self._layers(most), *self._pairs(most), *self._alone(most))
        return "\n".join(lines).rstrip("\n")

    def __str__(self) -> str:
        return self.render()

    def _totals(self) -> Iterator[str]:
        for mark, side in (("A", self.a), ("B", self.b)):
            ratio = f", {_ratio(self.a, self.b):.3f} of A" if mark == "B" and self.a.nbytes else ""
            yield from wrapped(f"{mark}  ", f"{side.name}: {side.nbytes:,} bytes{ratio}, {side.tensors:,} tensors")
        yield ""
        if self.outputs is not None:
            yield f"outputs   {_words(self.outputs)}"
        if self.layers:
            where = "nowhere: no module adds much to the difference"
            if self.diverges_at is not None:
                (layer,) = (one for one in self.layers if one.name == self.diverges_at)
                where = f"at {_label(layer)}: {_level(layer.input)} at its input, {_after(layer)} at its output"
            yield from wrapped("diverges  ", where)
        if self.pairs:
            yield f"weights   {_words(self.weights)}"
            yield f"tensors   {self._counts()}"

    def _counts(self) -> str:
        misfits = sum(pair.similarity is None for pair in self.pairs)
        sides = [sum(one.side == side for one in self.alone) for side in "AB"]
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
        table = new_table("tensor", "format", "bytes", "bytes in B", "SQNR dB", "max err", "1-cos")
        notes = Notes()
        for pair in shown:
            format = " → ".join(dict.fromkeys(pair.formats))
            cells = [pair.name + notes.mark(_note(pair)), format, *(f"{n:,}" for n in pair.nbytes)]
            add_row(table, [*cells, *_figures(pair.similarity)])
        yield from drawn(table)
        yield from notes.lines()
        rest = len(self.pairs) - len(shown)
        equal = self.identical - sum(pair.identical for pair in shown)
        yield from and_more(rest, f"tensors, {equal:,} of them equal bit for bit" if equal else "tensors")

    def _alone(self, most: int) -> Iterator[str]:
        if not self.alone:
            return
        table = new_table("tensor", "only in", "shape", "format", "bytes")
        notes = Notes()
        for one in self.alone[:most]:
            shape = "x".join(map(str, one.shape)) or "scalar"
            add_row(table, [one.name + notes.mark(one.note), one.side, shape, one.format, f"{one.nbytes:,}"])
        yield from drawn(table)
        yield from notes.lines()
        yield from and_more(len(self.alone) - most, "tensors")

    def _layers(self, most: int) -> Iterator[str]:
        if not self.layers:
            return
        table = new_table("output of", "class", "calls", "SQNR dB", "input", "drop", "max err", "1-cos", "")
        notes = Notes()
        steepest = sorted(self.layers, key=lambda layer: (layer.name != self.diverges_at, -layer.drop))[:most]
        shown = [layer for layer in self.layers if any(layer is one for one in steepest)]
        for layer in shown:
            sqnr, error, apart = _figures(layer.similarity)
            drop = f"{layer.drop:.1f}" if layer.drop >= 1 else ""
            mark = "diverges here" if layer.name == self.diverges_at else ""
            name = _label(layer) + notes.mark(layer.note)
            cells = [name, layer.kind, f"{layer.calls:,}", sqnr, _decibels(layer.input), drop, error, apart, mark]
            add_row(table, cells)
        yield from drawn(table)
        yield from notes.lines()
        yield from and_more(len(self.layers) - most, "modules, where less is lost")


def _label(layer: LayerOutput) -> str:
    return layer.name or "(the model)"


def _level(sqnr: float) -> str:
    return "equal" if sqnr == math.inf else f"{sqnr:.1f} dB"


def _after(layer: LayerOutput) -> str:
    return _level(layer.similarity.sqnr) if layer.similarity is not None else layer.note


def _note(pair: Pair) -> str:
    parts = [pair.note]
    if pair.by == "content":
        parts.append(f"found by its numbers: {pair.names[1]} in B")
    if pair.similarity is None and pair.shapes[0] != pair.shapes[1]:
        parts.append(f"shape {list(pair.shapes[0])} in A, {list(pair.shapes[1])} in B")
    return "; ".join(filter(None, parts))


def _ratio(a: Side, b: Side) -> float:
    return b.nbytes / a.nbytes if a.nbytes else math.nan


def _words(similarity: Similarity) -> str:
    if similarity.same:
        return "equal"
    error = f"largest error {similarity.error:.3g} ({similarity.relative_error:.2g} of the largest number)"
    return f"SQNR {_level(similarity.sqnr)}, 1 - cosine {_apart(similarity.cosine)}, {error}"


def _figures(similarity: Similarity | None) -> tuple[str, str, str]:
    """SQNR, the largest error, and what the cosine lacks to 1."""
    if similarity is None:
        return "differs", "", ""
    if similarity.same:
        return "equal", "", ""
    return _decibels(similarity.sqnr), f"{similarity.error:.1e}", _apart(similarity.cosine)


def _decibels(sqnr: float) -> str:
    return "equal" if sqnr == math.inf else f"{sqnr:.1f}"


def _apart(cosine: float) -> str:
    return "nan" if math.isnan(cosine) else f"{1 - cosine:.1e}"


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
