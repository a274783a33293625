"""`make bench-figures`: fidelity at given sizes of MiniLM and EfficientNet-Lite0, as JSON in `out/bench`.

MiniLM is calibrated on the first 100 documents of the Lee background corpus and judged by 1 - cosine to FP32 on the 50
Lee documents and on 200 paragraphs of Wikipedia; EfficientNet-Lite0 is calibrated on photos and judged by its
divergence from FP32 on others. Each model's files come from one calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from examples import minilm
from rich.console import Console
from rich.table import Table

import pared
from bench import zoo
from bench.calibrated import Calibrated
from bench.search import peak_memory
from pared import PostTrainingQuantConfig
from pared.fitting.search.compressor import Compressor

RESULTS = Path("out/bench/figures.json")
WIDTH = 140  # of the tables, also where standard output is not a terminal

# Bytes of MiniLM's file: the first is that of NNCF's int8, the third that of OpenVINO's int4.
SIZES = (23_300_000, 17_100_000, 12_400_000, 11_200_000, 9_000_000, 7_900_000)
APPROACHES: tuple[Literal["weight_only", "auto"], ...] = ("weight_only", "auto")
FITTED = 9_000_000  # bytes, of the one `fit` that is timed

DIVERGENCE = 0.018  # nats, of EfficientNet on unseen photos
_FIRST_DAMAGE = 0.02
_ROUNDS = 6  # of closing in on the divergence
_CLOSE = 0.97  # so near to it is near enough
_BESIDE = (0.125, 0.25, 0.5, 2.0)  # other damages, relative to the one that was found


@dataclass(frozen=True)
class SizePoint:
    """MiniLM at one size; bytes, seconds."""

    approach: str
    asked: int
    planned: int
    nbytes: int
    damage: float
    lee: float
    wikipedia: float
    seconds: float


@dataclass(frozen=True)
class PhotoPoint:
    """EfficientNet at one damage; bytes, nats."""

    damage: float
    planned: int
    nbytes: int
    ratio: float
    kl: float
    agreement: float


def fit_once(approach: Literal["weight_only", "auto"], nbytes: int) -> dict[str, float]:
    """One `fit` without evaluations, in a process of its own."""
    model, calibration = minilm.load(), minilm.calibration()
    before, start = peak_memory(), time.perf_counter()
    fitted = pared.fit(model, PostTrainingQuantConfig(approach=approach, max_size=nbytes), calibration, quiet=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_before": before, "peak": peak_memory(), "nbytes": fitted.nbytes, "asked": nbytes}  # type: ignore[dict-item]  # ours


def in_child(approach: str, threads: int) -> Any:
    """Call this before the process has grown: a child's peak starts at its parent's."""
    command = [sys.executable, "-m", "bench.figures", "--fit", approach, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def minilm_points() -> Iterator[SizePoint]:
    pair = zoo.find("minilm")
    known = Calibrated.on(minilm.load(), minilm.calibration())
    for approach in APPROACHES:
        compressor = known.compressor(PostTrainingQuantConfig(approach=approach))
        for nbytes in SIZES:
            start = time.perf_counter()
            point = compressor.within_bytes(nbytes)
            built = compressor.build(point)
            seconds = time.perf_counter() - start
            found = pair.metrics(built, 0)
            lee, wikipedia = found["1 - cos on Lee"], found["1 - cos on Wikipedia"]
            yield SizePoint(approach, nbytes, point.nbytes, built.nbytes, point.damage, lee, wikipedia, seconds)


def photo_points() -> list[PhotoPoint]:
    """At the most damage that keeps the divergence on unseen photos, and at others beside it."""
    pair = zoo.find("efficientnet")
    model = pair.load()
    compressor = Calibrated.on(model, pair.calibration(0)).compressor()
    float_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())

    def divergence(damage: float) -> float:
        return float(pair.scores(compressor.build(compressor.at_damage(damage)), "test", 0).mean())

    def point(damage: float) -> PhotoPoint:
        operating = compressor.at_damage(damage)
        built = compressor.build(operating)
        kl, agreement = float(pair.scores(built, "test", 0).mean()), pair.metrics(built, 0)["agreement with FP32"]
        return PhotoPoint(damage, operating.nbytes, built.nbytes, built.nbytes / float_bytes, kl, agreement)

    damage = most_damage(divergence, compressor)
    return sorted((point(damage * share) for share in (*_BESIDE, 1.0)), key=lambda p: p.damage)


def most_damage(divergence: Callable[[float], float], compressor: Compressor[Any]) -> float:
    """The most damage that keeps `DIVERGENCE`: by the law of proportion, between what kept it and what did not."""
    low, high, damage = 0.0, math.inf, _FIRST_DAMAGE
    for _ in range(_ROUNDS):
        damage = min(max(damage, compressor.least), compressor.most)
        found = divergence(damage)
        low, high = (max(low, damage), high) if found <= DIVERGENCE else (low, min(high, damage))
        if _CLOSE * DIVERGENCE <= found <= DIVERGENCE:
            break
        damage *= 0.985 * DIVERGENCE / found
        if not low < damage < high:
            damage = math.sqrt(low * high) if low and math.isfinite(high) else low * 1.1 or high / 2
    assert low > 0, "no damage that was tried keeps the divergence"
    return low


def show(found: dict[str, Any]) -> None:
    console = Console(width=WIDTH)
    table = Table(title="all-MiniLM-L6-v2")
    for column in ("approach", "file MB", "real / plan", "damage", "Lee", "Wikipedia", "Wiki / Lee", "s"):
        table.add_column(column, justify="right")
    for p in (SizePoint(**record) for record in found.get("minilm", ())):
        table.add_row(
            *(p.approach, f"{p.nbytes / 1e6:.3f}", f"{p.nbytes / p.planned:.4f}", f"{p.damage:.2e}", f"{p.lee:.5f}"),
            *(f"{p.wikipedia:.5f}", f"{p.wikipedia / p.lee:.2f}", f"{p.seconds:.0f}"),
        )
    console.print(table)
    table = Table(title="EfficientNet-Lite0, weights only")
    for column in ("file MB", "of FP32", "real / plan", "damage", "KL, unseen photos", "agreement"):
        table.add_column(column, justify="right")
    for q in (PhotoPoint(**record) for record in found.get("efficientnet", ())):
        table.add_row(
            *(f"{q.nbytes / 1e6:.3f}", f"{q.ratio:.4f}", f"{q.nbytes / q.planned:.4f}", f"{q.damage:.2e}"),
            *(f"{q.kl:.4f}", f"{q.agreement:.3f}"),
        )
    console.print(table)
    for approach, fit in found.get("fit", {}).items():
        console.print(
            f"fit of MiniLM, {approach}, max_size {fit['asked'] / 1e6} MB: {fit['seconds']:.1f} s, "
            f"peak {fit['peak'] / 1e9:.2f} GB ({fit['peak_before'] / 1e9:.2f} GB before)",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("fit", "minilm", "efficientnet"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", choices=APPROACHES, help="(internal) one fit in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.fit:
        print(json.dumps(fit_once(options.fit, FITTED)))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    parts: dict[str, Callable[[], Any]] = {
        "fit": lambda: {approach: in_child(approach, options.threads) for approach in APPROACHES},
        "minilm": lambda: [asdict(point) for point in minilm_points()],
        "efficientnet": lambda: [asdict(point) for point in photo_points()],
    }
    for part in options.only or parts:
        print(f"{part} ...", flush=True)
        found[part] = parts[part]()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
