"""What a page shows of a made-up model of any number of layers, with something to say in every section."""

import random

from pared.artifact.outcome import Confirmation, Curve, Outcome, Point, Trial
from pared.inspection.findings import Finding
from pared.inspection.ledger import Ledger, Row
from pared.inspection.page.data import PageData

HOSTILE = "</script><img src=x onerror=alert(1)>"


def full(layers: int = 12, extra: tuple[Row, ...] = ()) -> PageData:
    """Every other layer runs in int8; every tenth is left in float."""
    draw = random.Random(0)
    rows, times, running, activations = [], {}, {}, {}
    kernels: dict[str, str] = {}
    damages: dict[str, float] = {}
    for i in range(layers):
        module = f"blocks.{i // 10}.layers.{i % 10}.projection"
        format, nbytes = ("float32", 65536) if i % 10 == 9 else ("grid int8", draw.randrange(5000, 16000))
        because = "a rule says so" if i % 10 == 9 else "the search gave it a step"
        rows.append(Row(f"{module}.weight", (128, 128), format, nbytes, because, original=("float32", 65536)))
        rows.append(Row(f"{module}.bias", (128,), "float16", 256, original=("float32", 512)))
        kernel = "int8" if i % 2 else "float32"
        kernels |= {f"{module}.weight": f"{kernel} static", f"{module}.bias": "float"}
        damages |= {f"{module}.weight": draw.uniform(1e-7, 1e-4), f"{module}.bias": 1e-9}
        times[module] = {name: draw.uniform(0.05, 1.0) for name in ("float32", "bfloat16", "int8")}
        running[module] = kernel
        activations[module] = {"mode": "static", "low": -draw.uniform(0, 9), "high": draw.uniform(0, 90)}
    rows += [*extra, Row("(index)", None, "index", 400), Row("(container)", None, "container", 900)]
    nbytes = sum(row.nbytes for row in rows)
    original = sum(row.original[1] for row in rows if row.original)
    elements = sum(row.elements for row in rows)
    findings = (
        Finding("wide-float", nbytes // 2, (rows[0].name,), "float32 where half is lossless", "pared compress", 1000),
    )
    trials = (
        Trial(1e-9, 1e-3, 2 * nbytes, 0.91, 0.01, True, 1.5, 0.001, Confirmation(0.9, 0.92, 0.02, 0.002)),
        Trial(1e-8, 8e-3, nbytes, 0.9, 0.02, True, 1.4),
    )
    points = tuple(Point(1e-9, 10.0**-i, nbytes * i) for i in (1, 3, 4))
    return PageData(
        Ledger("made-up", nbytes, tuple(rows), elements, original, findings),
        fitted=True,
        outcome=Outcome(True, 0.9, 0.92, 0.0, Confirmation(0.9, 0.92, 0.02, 0.002), trials),
        curve=Curve(points).scored(Outcome(baseline=0.92, trials=trials)),
        kernels=kernels,
        damages=damages,
        activations=activations,
        times=times,
        running=running,
        provenance={"pared": "0.1.0", "seed": 0, "approach": "auto"},
    )
