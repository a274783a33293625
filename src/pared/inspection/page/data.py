"""What a page shows of a quantized model, an artifact or any other file, as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pared.artifact.envelope import artifact_in, records_of
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
_GROUPS: Final = re.compile(r"int\d (g\d+|row)")  # the labels of grids with groups
_MAX_DEPTH: Final = 16  # levels of the treemap: a name in a file may have any number of dots
FLOATS: Final = ("half", "float")


@dataclass(frozen=True)
class PageData:
    """Everything that a page shows.

    Args:
        ledger: where the bytes are, and what was found.
        fitted: whether this is a quantized model in memory, which knows more than its file.
        outcome: how the search went.
        curve: the trade-off, if one was traced.
        kernels: what runs with each tensor, by the tensor's name: "int8 static", "bfloat16", "float".
        damages: the predicted damage of each tensor, by its name, as a share of the output's energy.
        activations: how the input of each module is quantized, by the module's name, as stored in an artifact.
        times: milliseconds by kernel ("float32", "bfloat16", "int8") on this machine, by the module's name.
        running: which of these kernels runs, for the modules in `times`.
        provenance: plain data.
    """

    ledger: Ledger
    fitted: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    curve: Curve | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    damages: Mapping[str, float] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """The lowest and the highest input of each module whose range was fixed by calibration."""
        return {
            name: (float(activation["low"]), float(activation["high"]))
            for name, activation in self.activations.items()
            if activation["mode"] == "static"
        }

    @property
    def chosen(self) -> Point | None:
        """The model as a point of the curve; None if its damage was not predicted."""
        nbytes = self.ledger.nbytes
        for trial in self.outcome.trials:
            if trial.nbytes == nbytes:
                return Point(trial.price, trial.damage, nbytes, trial.score)
        damage = sum(self.damages.values())
        return Point(0.0, damage, nbytes) if damage > 0 else None

    def module_of(self, row: Row) -> str:
        """The name of the quantized module that has this tensor as its weight; "" if there is none."""
        module, _, attribute = row.name.rpartition(".")
        activation = self.activations.get(module, {"weights": ()})
        return module if attribute in activation.get("weights", ("weight",)) else ""


def family(format: str, *, tensor: bool = True) -> str:
    """The family of a format: a key of `charts.FAMILIES`.

    >>> family("grid int8, scaled"), family("int4 g32"), family("bfloat16"), family("index", tensor=False)
    ('codes', 'codes', 'half', 'rest')
    """
    if not tensor:
        return "rest"
    if _GROUPS.fullmatch(format):
        return "codes"
    grid, _, _ = format.partition(", ")  # "grid int8, scaled": scales of columns do not change what codes are
    return _FAMILIES.get(grid, "half" if format.startswith("float8") else "other")


def family_of(row: Row) -> str:
    """The family of a row's format."""
    return family(row.format, tensor=row.shape is not None)


def tiles(ledger: Ledger) -> tuple[Tile, ...]:
    """The bytes of each module: in the source, if that is known, and in the file. They sum to the totals of both."""
    groups: dict[str, list[Row]] = {}
    for row in ledger.rows:
        name = printable(row.name)
        module, dot, _ = name.rpartition(".") if row.shape is not None else ("", "", "")
        groups.setdefault(f"{module}{dot}" or name, []).append(row)
    return tuple(_tile(start, rows, ledger.original_nbytes is not None) for start, rows in groups.items())


def _tile(start: str, rows: Sequence[Row], sourced: bool) -> Tile:
    """One tile for the tensors in `rows`, whose names begin with `start`."""
    path = tuple(start.removesuffix(".").split(".", _MAX_DEPTH))
    maps = [[(family_of(row), row.nbytes) for row in rows]]
    if sourced:
        maps.insert(0, [_before(row) for row in rows])
    sizes = tuple(sum(nbytes for _, nbytes in parts) for parts in maps)
    return Tile(path, sizes, tuple(_largest(parts) for parts in maps), start)


def _before(row: Row) -> tuple[str, int]:
    if row.original is None:
        return family_of(row), 0
    return family(row.original[0]), row.original[1]


def _largest(sizes: Sequence[tuple[str, int]]) -> str:
    """The family that most of the bytes are in."""
    totals: dict[str, int] = {}
    for name, nbytes in sizes:
        totals[name] = totals.get(name, 0) + nbytes
    return max(totals, key=lambda name: totals[name])


def of_file(path: Path, ledger: Ledger) -> PageData:
    """What a page shows of a file or folder; for an artifact, that includes what it records about itself.

    Raises:
        FileError: the file cannot be read, or is damaged.
    """
    artifact = artifact_in(path)
    if not artifact.is_file():
        return PageData(ledger)
    with open_file(artifact) as file:
        records = records_of(file)
        if records is None:
            return PageData(ledger)
        index = parse_index(records)
    provenance = dict(index.provenance)
    outcome = Outcome.from_json(provenance.pop("outcome", {}))
    return PageData(ledger, outcome=outcome, activations=index.modules, provenance=provenance)
