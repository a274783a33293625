"""`make bench-ablation`: the table of refinements, as JSON in `out/bench`."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from examples import minilm
from rich.console import Console
from rich.table import Table
from torch import nn

from bench import data, zoo
from bench.ablation import columns, ranges, staged, switches, tuning
from bench.ablation.series import Losses, Point, Series, Subject, point, saved, series, size
from bench.calibrated import Calibrated
from pared.fitting.calibration.observe import InputStats
from pared.fitting.search.activations import choose_activations, find_candidates
from pared.model.contents import Contents

RESULTS = Path("out/bench/ablation.json")
WIDTH = 150  # of the table, also where standard output is no terminal
_PASSAGES = 100


@dataclass(frozen=True)
class Row:
    """What one refinement earns.

    Args:
        what: the refinement, and what it is held against.
        subject: the model.
        saved: the share of bytes that it saves at equal loss, by loss; "bytes" where the loss is the same.
        seconds: of processor time that it takes more, over all files of the series.
        kept: whether the library has it.
        note: what else was found.
    """

    what: str
    subject: str
    saved: Mapping[str, float]
    seconds: float
    kept: bool
    note: str = ""


def _minilm() -> tuple[Subject, Calibrated]:
    model = minilm.load()
    texts = {"Lee": minilm.documents(), "Wikipedia": data.passages(_PASSAGES)}
    expected = {name: minilm.embed(model, documents) for name, documents in texts.items()}

    def losses(candidate: nn.Module) -> Losses:
        return {name: minilm.distance(minilm.embed(candidate, texts[name]), expected[name]) for name in texts}

    return Subject("MiniLM", (0.03, 0.012, 0.004), losses), Calibrated.on(model, minilm.calibration())


def _efficientnet() -> tuple[Subject, Calibrated]:
    pair = zoo.find("efficientnet")
    known = Calibrated.on(pair.load(), pair.calibration(0))

    def losses(candidate: nn.Module) -> Losses:
        return {"KL": float(pair.scores(candidate, "test", 0).mean())}

    return Subject("EfficientNet-Lite0", (0.03, 0.012, 0.004), losses), known


SUBJECTS = {"minilm": _minilm, "efficientnet": _efficientnet}


@dataclass(frozen=True, eq=False)
class Lab:
    """One model, and the files that the library makes of it, to compare with."""

    subject: Subject
    known: Calibrated
    base: Series

    def row(self, what: str, having: Sequence[Point], lacking: Sequence[Point], seconds: float, kept: bool) -> Row:
        earned = {loss: saved(having, lacking, loss) for loss in having[0].losses}
        return Row(what, self.subject.name, earned, seconds, kept)

    def without(
        self, what: str, known: Calibrated | None = None, patch: AbstractContextManager[Any] | None = None
    ) -> Row:
        """A refinement of the library, switched off."""
        with patch or nullcontext():
            other = series(self.subject, known or self.known)
        return self.row(what, self.base.points, other.points, self.base.seconds - other.seconds, kept=True)

    def bytes_without(self, what: str, patch: AbstractContextManager[Any]) -> Row:
        """A refinement of the file alone: the same model in other bytes."""
        start = time.process_time()
        having = sum(size(contents) for contents in self.base.contents)
        middle = time.process_time()
        with patch:
            lacking = sum(size(contents) for contents in self.base.contents)
        seconds = (middle - start) - (time.process_time() - middle)
        return Row(what, self.subject.name, {"bytes": 1 - having / lacking}, seconds, kept=True)

    def dead_zone(self, share: float) -> Row:
        """Rounding by rate, which the library does not do."""
        with switches.dead_zone(share):
            other = series(self.subject, self.known)
        what = f"rate-aware rounding, {share} of step / spread, against nearest codes"
        return self.row(what, other.points, self.base.points, other.seconds - self.base.seconds, kept=False)

    def after(self, what: str, change: Callable[[], Iterator[Contents]]) -> Row:
        """Something the library does not do, done to its files."""
        start = time.process_time()
        changed = list(change())
        seconds = time.process_time() - start
        points = [point(self.subject, self.known, contents) for contents in changed]
        return self.row(what, points, self.base.points, seconds, kept=False)

    def static_ranges(self) -> Row:
        """All layers static, with ranges of the least rounding error and by the extremes of calibration."""
        start = time.process_time()
        least = ranges.of_least_error(self.known.model, self.known.seen)
        seconds = time.process_time() - start

        def points(inputs: Mapping[str, InputStats]) -> list[Point]:
            found = []
            for contents in self.base.contents:
                candidates = find_candidates(self.known.model, contents.tensors, inputs)
                activations = choose_activations(candidates, "static", {}, float("inf"))
                found.append(point(self.subject, self.known, replace(contents, activations=activations)))
            return found

        having, lacking = points(least), points(self.known.seen.inputs)
        first = next(iter(having[0].losses))
        shares = [a.losses[first] / b.losses[first] for a, b in zip(having, lacking, strict=True)]
        what = "all inputs static: ranges of the least error, against the extremes"
        row = self.row(what, having, lacking, seconds, kept=False)
        return replace(row, note=f"{first}: {', '.join(f'{share:.2f}' for share in shares)} of the loss")

    def column_scales(self) -> Row:
        start = time.process_time()
        found = columns.summary(columns.gains(self.known))
        earned = {"bytes": found["bytes"] / size(self.base.contents[0])}
        note = (
            f"at most; more than {columns.ENOUGH} bit in {found['above, unseen']} of {found['tensors']} tensors, "
            f"judged by unseen calls ({found['above, naive']} by the same); {found['bits, unseen']:.3f} bit per weight"
        )
        what = "column scales inside the layer, against none (predicted)"
        return Row(what, self.subject.name, earned, time.process_time() - start, kept=False, note=note)


def experiments(lab: Lab) -> dict[str, Callable[[], Row]]:
    known, base = lab.known, lab.base
    found: dict[str, Callable[[], Row]] = {
        "feedback": lambda: lab.without("error feedback, against nearest", switches.without_feedback(known)),
        "rows": lambda: lab.without("steps by rows' importance, against one", patch=switches.one_exponent()),
        "classes": lambda: lab.bytes_without("coder tables by class of rows, against one", switches.one_class()),
        "steps": lambda: lab.bytes_without("coded log steps, against float32", switches.float_steps()),
        "unseen": lambda: lab.without("curves judged by unseen calls, against the same", switches.flattered(known)),
        **{f"dead zone {share}": functools.partial(lab.dead_zone, share) for share in switches.DEAD_ZONES},
        "columns": lab.column_scales,
    }
    if lab.subject.name == "MiniLM":
        targets = functools.partial(staged.corrected_targets, known, base)
        found |= {
            "tables": lambda: lab.without(
                "tables' rows by their use, against uniform", patch=switches.uniform_tables()
            ),
            "ranges": lab.static_ranges,
            "tuning": lambda: lab.after("tuned norms and biases", lambda: tuning.tuned(known, base)),
            "biases": lambda: lab.after("bias correction", lambda: staged.corrected_biases(known, base)),
            "targets": lambda: lab.after("corrected targets", lambda: targets(own_moments=False)),
            "targets, moments": lambda: lab.after(
                "corrected targets, and moments of the compressed inputs", lambda: targets(own_moments=True)
            ),
        }
    return found


def show(rows: Sequence[Row]) -> None:
    table = Table(title="What refinements save in bytes at equal loss")
    for column in ("refinement", "model", "saved", "CPU s", "", "note"):
        table.add_column(column, justify="right" if column in ("saved", "CPU s") else "left")
    for row in rows:
        shares = ", ".join(f"{loss} {100 * share:+.1f} %" for loss, share in row.saved.items())
        table.add_row(
            row.what, row.subject, shares, f"{row.seconds:+.0f}", "kept" if row.kept else "rejected", row.note
        )
    Console(width=WIDTH).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--only", nargs="+", help="names of experiments")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for model in options.models:
        subject, known = SUBJECTS[model]()
        lab = Lab(subject, known, series(subject, known))
        print(f"{model}: {[asdict(p) for p in lab.base.points]}, {lab.base.seconds:.0f} s", flush=True)
        for name, experiment in experiments(lab).items():
            if options.only and name not in options.only:
                continue
            records[f"{model}/{name}"] = asdict(experiment())
            print(f"{model}/{name}: {records[f'{model}/{name}']}", flush=True)
            RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    show([Row(**record) for record in records.values()])
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
