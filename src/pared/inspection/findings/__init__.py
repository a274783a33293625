"""Why a file is larger than it should be: a table of causes, each with the function that detects it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Final

from pared.checkpoints.sampling import predict_nbytes
from pared.errors import ConfigError, ModelError
from pared.formats.dtypes import FLOATING
from pared.inspection.findings.content import Content
from pared.inspection.findings.copies import duplicate, two_copies, untied
from pared.inspection.findings.finding import WORTH_NBYTES, WORTH_SHARE, Case, Cause, Depth, Finding, megabytes
from pared.inspection.findings.structure import (
    ballast,
    executable_pickle,
    left_in_float,
    optimizer_state,
    quantized_already,
    stray_bytes,
    view_of_larger_storage,
    wide_float,
)
from pared.readers.listing import Listing

__all__ = ["DETECTORS", "KINDS", "QUANTIZED_ALREADY", "Depth", "Finding", "find", "is_sampled", "megabytes"]

QUANTIZED_ALREADY: Final = "quantized-already"
# The most bytes of tensor data to read, by depth; None: no limit.
_MOST: Final[dict[Depth, int | None]] = {"quick": 0, "default": 10**9, "deep": None}

# Remedies for what `pared compress` does not change: it keeps integers as they are.
_NARROWER: Final = "Store it in the narrower type, and convert it after loading if it is used as an index."
_RECOMPUTED: Final = "If the model can compute it again, leave it out: register_buffer(..., persistent=False)."


def _with_trait(kind: str, floats: bool, remedy: str = "") -> Callable[[Case], Iterator[Cause]]:
    """A detector of the tensors that show a trait of this kind; `floats`: among the floats, or among the others."""

    def detect(case: Case) -> Iterator[Cause]:
        details: dict[str, int] = {}
        names = []
        for seen in case.unexplained():
            if seen.trait is not None and seen.trait.kind == kind and (seen.held.dtype in FLOATING) == floats:
                names.append(seen.held.name)
                details[seen.trait.detail] = details.get(seen.trait.detail, 0) + case.stored(seen.held)
        if names:
            most = max(details, key=lambda detail: details[detail])
            more = f" and {len(names) - 1} more" if names[1:] else ""
            yield Cause(tuple(names), sum(details.values()), f"{names[0]}{more}: {most}", remedy)

    return detect


# They run in this order; tensors that one of them explains are skipped by the next ones.
DETECTORS: Final[tuple[tuple[str, Callable[[Case], Iterator[Cause]]], ...]] = (
    ("stray-bytes", stray_bytes),
    ("executable-pickle", executable_pickle),
    ("optimizer-state", optimizer_state),
    ("view-of-larger-storage", view_of_larger_storage),
    ("ballast", ballast),
    ("two-copies", two_copies),
    ("untied", untied),
    ("duplicate", duplicate),
    (QUANTIZED_ALREADY, quantized_already),
    ("left-in-float", left_in_float),
    ("zeros", _with_trait("zeros", floats=True)),
    ("zeros", _with_trait("zeros", floats=False, remedy=_RECOMPUTED)),
    ("fake-quantized", _with_trait("fake-quantized", floats=True)),
    ("wide-float", wide_float),
    ("wide-float", _with_trait("wide-float", floats=True)),
    ("wide-int", _with_trait("wide-int", floats=False, remedy=_NARROWER)),
)
KINDS: Final = tuple(dict.fromkeys(kind for kind, _ in DETECTORS))


def find(listing: Listing, path: str, depth: Depth = "default") -> tuple[Finding, ...]:
    """What makes a file larger than it should be; causes below one percent of its bytes are not reported.

    Args:
        listing: what is in the file or folder.
        path: the file or folder, as the user would write it in a command.
        depth: how much to read. "quick": only headers; "default": up to 1 GB of numbers, in larger files evenly
            spaced rows; "deep": all numbers.

    Returns:
        the findings, the largest first.
    """
    case = Case(listing, Content(listing, _MOST[depth]))
    causes: list[tuple[str, Cause]] = []
    for kind, detect in DETECTORS:
        for cause in detect(case):
            if cause.always or cause.nbytes >= max(WORTH_NBYTES, WORTH_SHARE * listing.nbytes):
                causes.append((kind, cause))
                case.explained.update(cause.names if cause.explains else ())
    causes.sort(key=lambda item: -item[1].nbytes)
    ours: tuple[str, int | None] = (f"pared compress {shlex.quote(path)} -o small", None)
    if depth != "quick" and any(not cause.remedy for _, cause in causes):
        ours = _compressed(listing, ours[0])
    return tuple(
        Finding(kind, cause.nbytes, cause.names, cause.evidence, *((cause.remedy, None) if cause.remedy else ours))
        for kind, cause in causes
    )


def _compressed(listing: Listing, command: str) -> tuple[str, int | None]:
    """The command and the bytes of what it would write; if it would fail, the remedy of its error and None."""
    try:
        return command, predict_nbytes(listing)
    except (ConfigError, ModelError) as error:
        return error.remedy, None


def is_sampled(listing: Listing, depth: Depth) -> bool:
    """Whether `find` reads only some of the numbers, to save time."""
    return Content(listing, _MOST[depth]).sampled
