"""What a page shows, as plain values: of a quantized model, of an artifact, or of any other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pared.artifact.envelope import artifact_in, records_of
from pared.artifact.index import Index
from pared.artifact.outcome import Curve, Outcome, Point
from pared.artifact.parse import parse_index
from pared.errors import printable
from pared.files.disk import open_file
from pared.inspection.ledger import Ledger, Row
from pared.inspection.page.treemap import Tile

_FAMILIES: Final[Mapping[str, str]] = {
    "grid int8": "codes",
    "grid int16": "wide-codes",
    "float16": "half",
    "bfloat16": "half",
    "float32": "float",
    "float64": "float",
    "complex64": "float",
    "complex128": "float",
}
_MOST_DEPTH: Final = 16  # of modules in modules: a name from a file may have any number of dots
FLOATS: Final = ("half", "float")


@dataclass(frozen=True)
class Detail:
    """What a live model knows about a tensor beside its bytes.

    Args:
        kernel: what runs: "int8 static", "bfloat16", "float".
        because: the reason for the format and for the kernel.
        damage: predicted, as a share of the output's energy; None without calibration data.
    """

    kernel: str
    because: str
    damage: float | None


@dataclass(frozen=True)
class Times:
    """What a layer was measured to take on this machine.

    Args:
        kernel: the one that runs: "float32", "bfloat16" or "int8".
        milliseconds: by kernel.
    """

    kernel: str
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class Facts:
    """All that a page shows.

    Args:
        ledger: where the bytes are, and what was found.
        fitted: whether it is of a quantized model that was fitted, which knows more than its file.
        outcome: how the search went.
        curve: the trade-off, where one was traced.
        details: by tensor.
        activations: how counterparts treat their input, by module, as an artifact keeps it.
        times: by module.
        provenance: plain data.
    """

    ledger: Ledger
    fitted: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    curve: Curve | None = None
    details: Mapping[str, Detail] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    times: Mapping[str, Times] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """The least and the greatest input of each module for which calibration fixed them."""
        return {
            name: (float(one["low"]), float(one["high"]))
            for name, one in self.activations.items()
            if one["mode"] == "static"
        }

    @property
    def chosen(self) -> Point | None:
        """The model itself as a point of the curve; None without a prediction of its damage."""
        nbytes = self.ledger.nbytes
        for one in self.outcome.trials:
            if one.nbytes == nbytes:
                return Point(one.price, one.damage, nbytes, one.score)
        damages = [one.damage for one in self.details.values() if one.damage is not None]
        return Point(0.0, sum(damages), nbytes) if sum(damages) > 0 else None

    def carrier(self, row: Row) -> str | None:
        """The module whose layer a tensor is the weight of; None for what is none."""
        module, _, attribute = row.name.rpartition(".")
        one = self.activations.get(module)
        return module if one is not None and attribute in one.get("weights", ("weight",)) else None


def family(format: str, *, tensor: bool = True) -> str:
    """The family of a format, a key of `charts.FAMILIES`.

    >>> family("grid int8"), family("bfloat16"), family("index", tensor=False)
    ('codes', 'half', 'rest')
    """
    if not tensor:
        return "rest"
    return _FAMILIES.get(format, "half" if format.startswith("float8") else "other")


def family_of(row: Row) -> str:
    """The family of a row's format."""
    return family(row.format, tensor=row.shape is not None)


def tiles(ledger: Ledger) -> tuple[Tile, ...]:
    """The bytes of each module: in the source, where one is known, and in the file. They sum to both."""
    groups: dict[str, list[Row]] = {}
    for row in ledger.rows:
        name = printable(row.name)
        module, dot, _ = name.rpartition(".") if row.shape is not None else ("", "", "")
        groups.setdefault(f"{module}{dot}" or name, []).append(row)
    return tuple(_tile(start, rows, ledger.original_nbytes is not None) for start, rows in groups.items())


def _tile(start: str, rows: Sequence[Row], sourced: bool) -> Tile:
    """Of the tensors whose names begin so."""
    path = tuple(start.removesuffix(".").split(".", _MOST_DEPTH))
    maps = [[(family_of(row), row.nbytes) for row in rows]]
    if sourced:
        maps.insert(0, [_before(row) for row in rows])
    sizes = tuple(sum(nbytes for _, nbytes in one) for one in maps)
    return Tile(path, sizes, tuple(_most(one) for one in maps), start)


def _before(row: Row) -> tuple[str, int]:
    if row.original is None:
        return family_of(row), 0
    return family(row.original[0]), row.original[1]


def _most(sizes: Sequence[tuple[str, int]]) -> str:
    totals: dict[str, int] = {}
    for name, nbytes in sizes:
        totals[name] = totals.get(name, 0) + nbytes
    return max(totals, key=lambda name: totals[name])


def of_file(path: Path, ledger: Ledger) -> Facts:
    """Of a file; of an artifact, or of the directory that holds one, with what the artifact itself records.

    Args:
        path: of the file.
        ledger: of the same file.

    Raises:
        FileError: the file cannot be read, or is damaged.
    """
    artifact = artifact_in(path)
    if not artifact.is_file():
        return Facts(ledger)
    with open_file(artifact) as file:
        records = records_of(file)
        if records is None:
            return Facts(ledger)
        index = parse_index(records)
    return of_index(ledger, index)


def of_index(ledger: Ledger, index: Index) -> Facts:
    """Of an artifact, with what it records."""
    provenance = dict(index.provenance)
    outcome = Outcome.from_json(provenance.pop("outcome", {}))
    return Facts(ledger, outcome=outcome, activations=index.modules, provenance=provenance)
