"""`make bench-targets`: models in the formats of other runtimes, and in pared's own, as JSON in `out/bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.targets import embedding, own, smollm2
from bench.targets.row import Row

RESULTS = Path("out/bench/targets.json")
WIDTH = 150  # of the table, also where standard output is no terminal
SUBJECTS: dict[str, Callable[[], Iterator[Row]]] = {
    "smollm2": smollm2.rows,
    "embedding": embedding.rows,
    "own": own.rows,
}


def shown(rows: list[Row]) -> Table:
    table = Table(title="In the formats of other runtimes; lower is better")
    for column in ("model", "format", "bits", "MB", "figure", "float", "nearest", "pared", "bar", "met", "s"):
        table.add_column(column, overflow="fold")
    for row in rows:
        near = "" if row.nearest is None else f"{row.nearest:.4g}"
        figures = (f"{row.exact:.4g}", near, f"{row.ours:.4g}", f"{row.bar:.4g}", "yes" if row.passed else "no")
        size = (f"{row.bits:.3f}", f"{row.nbytes / 1e6:.2f}", row.score)
        table.add_row(row.model, row.what, *size, *figures, f"{row.seconds:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = []
    for subject in options.subjects:
        for row in SUBJECTS[subject]():
            rows.append(row)
            print(f"{row.model}, {row.what}: {row.ours:.4g} (nearest {row.nearest}), bar {row.bar}", flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps([asdict(one) for one in rows], indent=1), encoding="utf-8")
    Console(width=WIDTH).print(shown(rows))


if __name__ == "__main__":
    main()
