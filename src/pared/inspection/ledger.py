"""Where the bytes of a file or of a model in memory are: one row per tensor, and the rows sum to the whole."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

from pared.artifact.envelope import Records, open_records
from pared.artifact.index import Entry, Index
from pared.artifact.listing import open_either
from pared.artifact.parse import parse_index
from pared.errors import ConfigError, printable
from pared.files.disk import as_path
from pared.inspection.findings import QUANTIZED_ALREADY, Depth, Finding, find, is_sampled, megabytes
from pared.readers.listing import ListedTensor, Listing, Note, Storage
from pared.readers.memory import is_model, list_model
from pared.terminal import WIDTH, Notes, table

_NOTHING_FOUND: Final = "No findings: nothing is stored twice, in a wider type than it needs, or without being used."
# The types into which other tools pack several codes.
_PACKED: Final = frozenset(("uint8", "int16", "uint16", "int32", "uint32", "float4_e2m1fn_x2"))
_NOTHING_IN_HEADERS: Final = "No findings in the headers; without --quick, the numbers are examined too."


@dataclass(frozen=True)
class Row:
    """The bytes of one tensor, or of another piece of a file.

    Args:
        name: the tensor's name; for other pieces a word in parentheses, such as "(index)".
        shape: the tensor's shape; None for other pieces.
        format: how a number is stored: "grid int8" or "float32", for example.
        nbytes: bytes in the file; 0 for a tensor whose numbers are counted in an earlier row.
        because: the reason for the format or for the bytes.
        original: the element type and the bytes in the source; None if the source is not known.
    """

    name: str
    shape: tuple[int, ...] | None
    format: str
    nbytes: int
    because: str = ""
    original: tuple[str, int] | None = None

    @property
    def elements(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def bits(self) -> float:
        """Bits in the file per element; 0 if there are no elements.

        >>> Row("w", (4, 4), "grid int8", 14).bits
        7.0
        """
        return 8 * self.nbytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Ledger:
    """All bytes of a file, or of a model in memory.

    Args:
        file: its name.
        nbytes: the bytes in total: exactly the sum of the rows.
        rows: the tensors, in the order of the file, then everything else.
        elements: the number of elements of all tensors; shared ones count once.
        original_nbytes: the bytes of these elements in the source; None if the source is not known.
        findings: why the file is larger than it should be, the largest finding first.
        sampled: whether the findings are based on a sample of the numbers, as for files of more than 1 GB.
        depth: how much was read for the findings; None if there was no search for any.
    """

    file: str
    nbytes: int
    rows: tuple[Row, ...]
    elements: int
    original_nbytes: int | None = None
    findings: tuple[Finding, ...] = ()
    sampled: bool = False
    depth: Depth | None = None

    @property
    def bits_per_weight(self) -> float:
        """The bits of the whole file, including its container, per element: see `unit`."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    @property
    def unit(self) -> str:
        """What an element is: "weight"; or "stored number", where other tools have packed several codes into one."""
        foreign = {name for finding in self.findings if finding.kind == QUANTIZED_ALREADY for name in finding.names}
        packed = (row for row in self.rows if row.name in foreign and row.format in _PACKED)
        return "stored number" if any(len(row.shape or ()) > 1 for row in packed) else "weight"

    def by_format(self) -> dict[str, int]:
        """The bytes of each format, the largest first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.format] = totals.get(row.format, 0) + row.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """The ledger as plain data."""
        rows = [
            {
                "name": row.name,
                "shape": None if row.shape is None else list(row.shape),
                "format": row.format,
                "bytes": row.nbytes,
                "bits": row.bits,
            }
            for row in self.rows
        ]
        findings = [finding.to_json() for finding in self.findings]
        return {
            "file": self.file, "bytes": self.nbytes, "rows": rows, "findings": findings, "sampled": self.sampled
        }  # fmt: skip

    def render(self) -> str:
        """The ledger as text of 100 columns: the totals, the findings, then a line for each row."""
        return "\n".join((*self._totals(), *self._findings(), *draw(self.rows)))

    def __str__(self) -> str:
        return self.render()

    def _totals(self) -> Iterator[str]:
        yield from textwrap.wrap(printable(self.file), WIDTH)
        ratio = f"{self.nbytes / self.original_nbytes:.3f} of the source, " if self.original_nbytes else ""
        yield f"{self.nbytes:,} bytes, {ratio}{self.bits_per_weight:.2f} bits per {self.unit}"
        if self.unit != "weight":
            yield "  (a stored number may hold several weights, which another tool has packed)"
        for format, nbytes in self.by_format().items():
            yield f"  {printable(format):<16}{nbytes:>15,} bytes{100 * nbytes / max(self.nbytes, 1):>8.2f} %"

    def _findings(self) -> Iterator[str]:
        """A line or two for each finding, grouped by remedy."""
        for remedy, after in dict.fromkeys((finding.remedy, finding.bytes_after) for finding in self.findings):
            yield ""
            for finding in self.findings:
                if finding.remedy == remedy:
                    share = f"{100 * finding.nbytes / max(self.nbytes, 1):.0f} %"
                    mark = f"{finding.kind:<23}{megabytes(finding.nbytes):>9}{share:>6}  "
                    yield from textwrap.wrap(
                        printable(finding.evidence), WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark)
                    )
            mark = "  -> " if after is None else f"  -> {megabytes(after)} ({after / max(self.nbytes, 1):.3f}): "
            command = remedy.startswith("pared ")  # on one line, so that it can be copied
            yield from [mark + printable(remedy)] if command else textwrap.wrap(mark + printable(remedy), WIDTH)
        if self.depth is not None and not self.findings:
            yield from ("", _NOTHING_FOUND if self.depth != "quick" else _NOTHING_IN_HEADERS)
        if self.sampled:
            yield from ("", "Based on a sample of 1 GB in evenly spaced rows; --deep reads everything.")


def inspect(target: object, *, depth: Depth = "default") -> Ledger:
    """Account for every byte of a file, a folder or a model in memory, and find out why a file is so large.

    Nothing in a file is executed, and torch is not imported. Findings are about files: a model in memory has none.

    Args:
        target: the path of an artifact, or of the directory that `save` wrote; of a file of torch (state dicts,
            checkpoints, whole modules, TorchScript, `.pt2`), safetensors, ONNX, GGUF or NumPy; of a folder of
            such files; or a `torch.nn.Module`.
        depth: how much to read. "quick": only headers; "default": up to 1 GB of numbers, in larger files evenly
            spaced rows; "deep": all numbers.

    Raises:
        FileError: the file cannot be read, or is of another kind.
        CorruptError: the file is damaged.
        UnsafeError: loading it would run code, or inflate without bound.
        VersionError: a newer version wrote the artifact.
        ConfigError: the target is neither a path nor a module, or `depth` is none of the three.
    """
    if depth not in get_args(Depth):
        raise ConfigError(
            f"{depth!r} is not a depth", where="inspect", remedy=f"Pass one of {', '.join(get_args(Depth))}."
        )
    if isinstance(target, str | os.PathLike):
        return _of_path(as_path(target, "inspect"), depth)
    if is_model(target):
        return _of_model(target)
    raise ConfigError(
        f"expected a path or a torch.nn.Module, got {type(target).__name__}",
        where="inspect",
        remedy="Pass the path of a file or of a folder, or the model.",
    )


def of_artifact_bytes(data: bytes, where: str) -> Ledger:
    """The ledger of an artifact in memory.

    Args:
        data: the bytes of the artifact.
        where: the name to show.
    """
    with open_records(data, where) as records:
        return of_records(records, parse_index(records))


def _of_path(path: Path, depth: Depth) -> Ledger:
    with open_either(path) as found:
        if isinstance(found, Records):
            return of_records(found, parse_index(found))
        findings = find(found, str(path), depth)
        return replace(_of_listing(found), findings=findings, sampled=is_sampled(found, depth), depth=depth)


def of_records(records: Records, index: Index) -> Ledger:
    """The ledger of an artifact whose index is known.

    Args:
        records: the artifact.
        index: what its first record says.
    """
    entries = index.entries
    rows = [Row(e.name, e.shape, e.label, e.nbytes, _reason(e), original=(e.dtype, e.source_nbytes)) for e in entries]
    pieces = {
        "(padding)": len(records.data) - sum(row.nbytes for row in rows),
        "(index)": len(records.index),
        "(container)": records.nbytes - len(records.index) - len(records.data),
    }
    return Ledger(
        file=records.where,
        nbytes=records.nbytes,
        rows=(*rows, *_others(pieces)),
        elements=sum(entry.elements for entry in entries),
        original_nbytes=sum(entry.source_nbytes for entry in entries),
    )


def _reason(entry: Entry) -> str:
    tied = f"also {', '.join(entry.names[1:])}" if len(entry.names) > 1 else ""
    return "; ".join(filter(None, (entry.because, tied)))


def _others(pieces: Mapping[str, int]) -> Iterator[Row]:
    """Rows for other pieces than tensors; the name says what each is."""
    return (Row(name, None, name.strip("()"), nbytes) for name, nbytes in pieces.items() if nbytes)


def _of_listing(listing: Listing) -> Ledger:
    """The ledger of a file of another kind. The bytes of a storage are counted with the first tensor in it."""
    tenants: dict[str, list[ListedTensor]] = {}
    for held in listing.tensors:
        if held.storage is not None:
            tenants.setdefault(held.storage, []).append(held)
    rows = [_row(held, tenants, listing.storages) for held in listing.tensors]
    unused = {key: s.nbytes for key, s in listing.storages.items() if key not in tenants and s.nbytes}
    rows += [Row(f"(data/{key})", None, "unused", n, "no tensor refers to it") for key, n in unused.items()]
    notes = {name: note for name, note in listing.notes.items() if note.nbytes}
    rows += [Row(name, None, _what(name, note), note.nbytes, note.because) for name, note in notes.items()]
    pieces = {"(container)": listing.nbytes - sum(row.nbytes for row in rows)}
    elements = sum(_distinct(group, listing.storages[key].nbytes) for key, group in tenants.items())
    return Ledger(listing.where, listing.nbytes, (*rows, *_others(pieces)), elements)


def _what(name: str, note: Note) -> str:
    """What a note is about, without the name of the file in a folder.

    >>> _what("(model.safetensors: header)", Note(8)), _what("(config.json)", Note(8, file=True))
    ('header', 'file')
    """
    return "file" if note.file else name.strip("()").rpartition(": ")[2]


def _row(held: ListedTensor, tenants: Mapping[str, Sequence[ListedTensor]], storages: Mapping[str, Storage]) -> Row:
    if held.storage is None:
        return Row(held.name, held.shape, held.label, 0, "on the meta device: it holds no numbers")
    first, *others = tenants[held.storage]
    if held is not first:
        return Row(held.name, held.shape, held.label, 0, f"kept in the storage of {first.name}")
    nbytes = storages[held.storage].nbytes
    because = ""
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        because = f"its storage is also that of {others[0].name}{more}"
    elif nbytes > held.nbytes and not storages[held.storage].coded:
        because = f"a view of {held.nbytes:,} bytes that keeps a storage of {nbytes:,}"
    return Row(held.name, held.shape, held.label, nbytes, because)


def _distinct(group: Sequence[ListedTensor], nbytes: int) -> int:
    """The number of distinct elements of the tensors in one storage: at most as many as it has room for."""
    total = sum(math.prod(held.shape) for held in group)
    needed = sum(held.nbytes for held in group)
    return total if needed <= nbytes else total * nbytes // needed


def _of_model(model: Any) -> Ledger:
    """The ledger of a module; that of a quantized model is the ledger of its artifact."""
    quantized = getattr(type(model), "_pared_artifact", None)
    if quantized is not None:
        return of_artifact_bytes(quantized(model), where=type(model).__name__)
    return _of_listing(list_model(model))


def draw(
    rows: Sequence[Row], kernels: Mapping[str, str] | None = None, damages: Mapping[str, float] | None = None
) -> list[str]:
    """A table of at most 100 columns; the reasons, which many rows share, are footnotes.

    Args:
        rows: in the order to show.
        kernels: what runs with each tensor, by its name; None: no such column.
        damages: the damage of each tensor, by its name, as a share of the output's energy; None: no such column.
    """
    notes = Notes()
    columns: dict[str, Callable[[Row], str]] = {
        "tensor": lambda row: row.name,
        "shape": lambda row: shape_text(row.shape),
        "format": lambda row: row.format,
        "bits": lambda row: f"{row.bits:.2f}" if row.elements else "",
        "bytes": lambda row: f"{row.nbytes:,}",
    }
    if damages is not None:
        columns["damage"] = lambda row: damage_text(damages.get(row.name))
    if kernels is not None:
        columns["runs"] = lambda row: kernels.get(row.name, "")
    if any(row.because for row in rows):
        columns["why"] = lambda row: notes.mark(row.because).strip()
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return [*table(list(columns), cells), *notes.lines()]


def shape_text(shape: Sequence[int] | None) -> str:
    """A shape as tables show it.

    >>> shape_text((3, 4)), shape_text(()), shape_text(None)
    ('3x4', 'scalar', '')
    """
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def damage_text(damage: float | None) -> str:
    """A damage as tables show it; "" if it is unknown."""
    return "" if damage is None else f"{damage:.1e}" if damage > 1e-12 else "0"
