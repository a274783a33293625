"""Made-up results of `make bench-peers`: two models, in which each tool has a time that is easily divided."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.peers.rows import Row, Timing

MACHINE = {
    "processor": "Abacus",
    "cores": 2,
    "memory": 24 << 30,
    "capability": "BEADS",
    "python": "3.11.7",
    "threads": 2,
}


def row(subject: str, peer: str, shapes: dict[str, float], **more: Any) -> dict[str, Any]:
    """A row as JSON has it.

    Args:
        shapes: the share of FP32's time, which is 100 ms, by shape. Three rounds, of which one is far off.
    """
    timings = {
        shape: Timing(ms=[[100 * share], [100 * share], [900.0]], fp32_ms=[[100.0], [100.0], [100.0]])
        for shape, share in shapes.items()
    }
    known = {"bytes": 25_000_000, "seconds": 8.0, "peak": 2 * 10**9, "score": 0.5, "fidelity": 0.01}
    return asdict(Row(subject, peer, timings=timings, **{**known, **more}))


def minilm() -> dict[str, Any]:
    """MiniLM with the times of all of its shapes; bfloat16 failed when it was judged."""
    calls = ("8 x 128 tokens", "1 x 128 tokens", "1 x 32 tokens")
    shares = {
        "fp32": (1.0, 1.0, 1.0),
        "openvino-int8": (0.2, 0.4, 0.5),
        "pared": (0.4, 0.2, 0.5),
        "pared-layers": (0.8, 0.8, 0.8),
    }
    more: dict[str, dict[str, Any]] = {
        "fp32": {"bytes": 100_000_000, "seconds": 0.0, "fidelity": 0.0},
        "openvino-int8": {"seconds": 4.0},
        "pared": {"seconds": 12.0, "bytes": 20_000_000, "form": "in OpenVINO"},
        "pared-layers": {"seconds": 0.1, "bytes": 20_000_000, "form": "layer by layer"},
    }
    rows = [row("minilm", peer, dict(zip(calls, each, strict=True)), **more[peer]) for peer, each in shares.items()]
    failed = asdict(Row("minilm", "bf16", errors=["judge: RuntimeError: no `mul`"]))
    first = {"float32": [0.4, 0.5, 4.0], "pared": [0.8, 1.0, 8.0]}
    return {"machine": MACHINE, "date": "2026-11-30", "minutes": 2.4, "rows": [*rows, failed], "first": first}


def smollm2() -> dict[str, Any]:
    shape = "32 tokens after 16"
    rows = [
        row("smollm2", "fp32", {shape: 1.0}, bytes=540_000_000, seconds=0.0),
        row("smollm2", "llamacpp-q8", {shape: 0.32}, seconds=1.0),
        row("smollm2", "pared", {shape: 0.64}, form="layer by layer"),
    ]
    return {"machine": MACHINE, "date": "2026-11-30", "minutes": 3.0, "rows": rows}


def found() -> dict[str, Any]:
    return {"minilm": minilm(), "smollm2": smollm2()}
