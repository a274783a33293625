"""What ours has to reach, computed from a run: one line each, with what stands beside it and the ratio of the two.

Times are medians of all runs of all rounds, in which the tools take turns. A ratio below 1 says that ours is faster.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.markdown import markdown
from bench.peers.families import BASELINE, CHOSEN, LLAMA, NNCF
from bench.peers.rows import Row, read

_NONE = "-"
_RUNTIMES = ("ort-fp32", "ort-dynamic", "ort-static")  # of ONNX Runtime, of which the fastest counts
# Calls of models, by the names of subjects and shapes.
BESIDE_NNCF = (
    ("minilm", "8 x 128 tokens"),
    ("minilm", "1 x 128 tokens"),
    ("minilm", "1 x 32 tokens"),
    ("efficientnet", "batch 1"),
    ("efficientnet", "batch 8"),
    ("crepe_full", "1 frame"),
    ("crepe_full", "16 frames"),
)


@dataclass(frozen=True)
class Bar:
    """One line.

    Args:
        what: the call, or what else is compared.
        ours, other: the two measurements, in words.
        ratio: ours / other, of times; None if one is missing.
    """

    what: str
    ours: str
    other: str
    ratio: float | None


def bars(found: Mapping[str, Any]) -> list[Bar]:
    """All lines, in the order of the table.

    Args:
        found: what `bench.peers` has written, by the names of subjects; models that were not run have empty lines.
    """
    rows = {name: {row["peer"]: read(row) for row in record["rows"]} for name, record in found.items()}
    return [*_beside_nncf(rows), *_single(rows), *_seconds(rows), _first(found.get("minilm", {}).get("first"))]


Rows = Mapping[str, Mapping[str, Row]]


def _beside_nncf(rows: Rows) -> Iterator[Bar]:
    lines = [_compared(rows, name, shape, [NNCF]) for name, shape in BESIDE_NNCF]
    yield from lines
    ratios = [line.ratio for line in lines if line.ratio is not None]
    of = f"{len(ratios)} of the {len(lines)} calls above"
    yield Bar(f"geometric mean of {of}", CHOSEN, NNCF, _mean(ratios))
    yield Bar(f"worst of {of}", CHOSEN, NNCF, max(ratios, default=None))


def _single(rows: Rows) -> Iterator[Bar]:
    for shape in _shapes(rows, "textgenrnn") or ("",):
        yield _compared(rows, "textgenrnn", shape, _RUNTIMES)
    for shape in _shapes(rows, "dual_path") or ("",):
        yield _compared(rows, "dual_path", shape, [BASELINE])
    yield _compared(rows, "whisper", (_shapes(rows, "whisper") or ("",))[-1], [BASELINE])  # the longest recording
    for shape in _shapes(rows, "smollm2") or ("",):
        yield _compared(rows, "smollm2", shape, [LLAMA], tokens=int(shape.split()[0]) if shape else None)


def _shapes(rows: Rows, name: str) -> Sequence[str]:
    own = rows.get(name, {}).get(CHOSEN)
    return [] if own is None else list(own.timings)


def _compared(rows: Rows, name: str, shape: str, others: Sequence[str], *, tokens: int | None = None) -> Bar:
    """Ours beside the fastest of others in one call."""
    known = {peer: row for peer, row in rows.get(name, {}).items() if shape in row.timings}
    best = min(
        (known[peer] for peer in others if peer in known), key=lambda row: row.timings[shape].median, default=None
    )
    own, what = known.get(CHOSEN), f"{name}, {shape}" if shape else name
    ratio = None if own is None or best is None else own.timings[shape].median / best.timings[shape].median
    return Bar(what, _said(own, shape, tokens), _said(best, shape, tokens) if best else others[0], ratio)


def _said(row: Row | None, shape: str, tokens: int | None) -> str:
    if row is None:
        return _NONE
    timing = row.timings[shape]
    time = f"{timing.median:.3g} ms" if tokens is None else f"{1e3 * tokens / timing.median:.1f} tokens/s"
    form = f" ({row.form})" if row.form else ""
    return f"{row.peer}{form}: {time}"


def _seconds(rows: Rows) -> Iterator[Bar]:
    """Compression, ours beside NNCF."""
    for name, each in rows.items():
        ours, theirs = (each[peer].seconds if peer in each else None for peer in (CHOSEN, NNCF))
        ratio = ours / theirs if ours and theirs else None
        words = [_NONE if one is None else f"{one:.1f} s" for one in (ours, theirs)]
        yield Bar(f"{name}: to make it", f"{CHOSEN}: {words[0]}", f"{NNCF}: {words[1]}", ratio)


def _first(found: Mapping[str, Sequence[float]] | None) -> Bar:
    what = "minilm: a new process, from the files to the first answer"
    if not found:
        return Bar(what, _NONE, _NONE, None)
    ours, floats = (statistics.median(found[form]) for form in (CHOSEN, "float32"))
    pairs = zip(found[CHOSEN], found["float32"], strict=True)
    return Bar(what, f"{CHOSEN}: {ours:.2f} s", f"FP32: {floats:.2f} s", statistics.median(a / b for a, b in pairs))


def _mean(ratios: Iterable[float]) -> float | None:
    """Their geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.mean(logs)) if logs else None


def table(found: Mapping[str, Any]) -> str:
    """The lines in Markdown; in bold where ours is not slower."""
    lines = [(bar.what, bar.ours, bar.other, _ratio(bar.ratio)) for bar in bars(found)]
    return markdown(("what", "ours", "beside", "ratio of times"), lines)


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return _NONE
    return f"**{ratio:.2f}**" if ratio <= 1 else f"{ratio:.2f}"
