"""The tables and remarks of `make bench-peers`, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.markdown import markdown
from bench.peers import bars, subjects
from bench.peers.families import BASELINE, CHOSEN, FLOORS, FORMS, OURS
from bench.peers.rows import Row, Timing, read

_NONE = "-"
_WRONG = 1e-3  # of the output's peak


def loss(row: Row, baseline: Row) -> float | None:
    """Relative, positive for worse."""
    if row.score is None or baseline.score is None:
        return None
    lost = baseline.score - row.score
    return (lost if subjects.find(row.subject).higher_is_better else -lost) / abs(baseline.score)


def table(rows: Sequence[Row]) -> str:
    """One model; the best of each column that is to be small stands in bold, floors apart."""
    subject = subjects.find(rows[0].subject)
    baseline = next(row for row in rows if row.peer == BASELINE)
    shapes = list(dict.fromkeys(shape for row in rows for shape in row.timings))
    fast = {shape: _fastest(rows, shape) for shape in shapes}
    reloaded = any(row.reloaded is not None or _reload(row) != _NONE for row in rows)
    small = _best(rows, lambda row: row.bytes)
    lines = [
        (
            _name(row),
            _bold(_size(row, baseline), row is small),
            _NONE if row.peer in FORMS else _plain(row.seconds, ".1f"),
            _NONE if row.peak is None else f"{row.peak / 1e9:.2f} ({(row.peak_before or 0) / 1e9:.2f})",
            _plain(row.score, ".4f"),
            _plain(loss(row, baseline), "+.2%"),
            _plain(row.fidelity, ".3g"),
            *(_bold(_time(row.timings.get(shape)), row is fast[shape]) for shape in shapes),
            *([_reload(row)] if reloaded else []),
        )
        for row in rows
    ]
    columns = (
        subject.title,
        "file MB (of FP32)",
        "compress s",
        "peak GB (before)",
        subject.score,
        "loss",
        subject.fidelity,
    )
    times = (f"{shape}: ms, of FP32" for shape in shapes)
    return markdown((*columns, *times, *(["reload"] if reloaded else [])), lines)


def _name(row: Row) -> str:
    """The peer; ours in bold, and what `fit` chose with the form that it chose."""
    if row.peer not in OURS:
        return row.peer
    return f"**{row.peer}**" + (f" ({row.form})" if row.form and row.peer not in FORMS else "")


def _best(rows: Sequence[Row], key: Any) -> Row | None:
    found = [row for row in rows if row.peer not in FLOORS and key(row) is not None]
    return min(found, key=key, default=None)


def _fastest(rows: Sequence[Row], shape: str) -> Row | None:
    return _best(rows, lambda row: row.timings[shape].ratio if shape in row.timings else None)


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best and text != _NONE else text


def _plain(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _size(row: Row, baseline: Row) -> str:
    if row.bytes is None or baseline.bytes is None:
        return _NONE
    return f"{row.bytes / 1e6:.2f} ({row.bytes / baseline.bytes:.3f})"


def _time(timing: Timing | None) -> str:
    """Median, least and most, and the ratio to FP32 in the same process, of rounds: median, least and most."""
    if timing is None:
        return _NONE
    least, most = timing.span
    times = " ".join(f"{x:.3g}" for x in (timing.median, least, most))
    middle, low, high = (f"{x:.3f}" for x in (timing.ratio, min(timing.ratios), max(timing.ratios)))
    return f"{times}; {middle} ({low}-{high})"


def _reload(row: Row) -> str:
    if row.reloaded is None:
        return "fails" if any(error.startswith("reload") for error in row.errors) else _NONE
    return f"yes ({row.needs})" if row.reloaded <= _WRONG else f"WRONG: off by {row.reloaded:.2g} of the peak"


def remarks(rows: Sequence[Row]) -> str:
    """Every error and note, by peer."""
    each = [(row.peer, "error", text) for row in rows for text in row.errors]
    each += [(row.peer, "note", text) for row in rows for text in row.notes]
    return "\n".join(f"* {peer}, {kind}: `{text.replace('`', chr(39))}`" for peer, kind, text in each)


PICTURE = """![loss against time](loss-time-all-light.svg#only-light)
![loss against time](loss-time-all-dark.svg#only-dark)"""


def whole(found: Mapping[str, Any]) -> str:
    """The last run: where and when, what ours has to reach, the picture, all models, the settings, the versions."""
    parts = [_about(found), bars.table(found), PICTURE]
    for name, record in found.items():
        rows = [read(row) for row in record["rows"]]
        said = remarks(rows)
        parts += [table(rows), *([f"Errors met and notes, {subjects.find(name).title}:\n\n{said}"] if said else [])]
    return "\n\n".join([*parts, _READING, _settings(found), _versions(found)])


def _about(found: Mapping[str, Any]) -> str:
    """One machine, one date, one command; or, where models were run apart, what differs between them."""
    each = [(_machine(record["machine"]), record.get("date", "no date")) for record in found.values()]
    machines, dates = (list(dict.fromkeys(one)) for one in zip(*each, strict=True))
    named = [subjects.find(name).title for name in found]
    minutes = sum(record.get("minutes", 0.0) for record in found.values())
    command = (
        "`make bench-peers`" if len(found) == len(subjects.NAMES) else f"`make bench-peers MODELS={','.join(found)}`"
    )
    rows = [
        ("machine", "; ".join(machines)),
        ("date", ", ".join(dates)),
        ("command", f"{command}, then `make results-docs`, which writes this section: {minutes:.0f} minutes"),
        ("models", ", ".join(named)),
    ]
    return markdown(("", "this run"), rows)


def _settings(found: Mapping[str, Any]) -> str:
    said = {row["peer"]: row["settings"] for record in found.values() for row in record["rows"] if row["settings"]}
    return "\n".join(f"* {peer}: {settings}" for peer, settings in said.items())


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
        f"{machine['capability']}, Python {machine['python']}, {machine['threads']} threads"
    )


_READING = (
    "Each tool has the settings that its documentation recommends, an environment of its own, and the same samples, "
    "inputs and threads. Sizes count all that the tool itself saves. Tools are timed in turn, round after round. "
    "Milliseconds: median, least and most. Ratios: to FP32 eager in the same process, median of the rounds, least and "
    "most. In bold: the smallest and the fastest. Peak: of the process while it compressed, and before it did. "
    f"`{CHOSEN}` is the model that `fit` gave, with the form that it chose in brackets; the other forms have its "
    "files, and an `engine.json` that prefers them."
)


def _versions(found: Mapping[str, Any]) -> str:
    environments: dict[str, list[str]] = {}
    for record in found.values():
        for row in record["rows"]:
            said = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            peers = environments.setdefault(said, [])
            peers += [row["peer"]] if row["peer"] not in peers else []
    return "\n".join(f"* {', '.join(peers)}: {said}" for said, peers in environments.items() if said)
