"""A model at several sizes, as the library makes it from some statistics, and what two such series differ by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bench.calibrated import Calibrated
from pared.fitting.search.compressor import Compressor
from pared.fitting.search.maker import OperatingPoint
from pared.model import storage
from pared.model.contents import Contents
from pared.runtime import quantized
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.record import contents_of

Losses = Mapping[str, float]


@dataclass(frozen=True)
class Subject:
    """A model and how it is judged.

    Args:
        name: of the model.
        damages: predicted ones of its files, falling.
        losses: of a model, all 0 for the float model, on data that nothing was calibrated on.
    """

    name: str
    damages: Sequence[float]
    losses: Callable[[nn.Module], Losses]


@dataclass(frozen=True)
class Point:
    """One file."""

    nbytes: int
    losses: Losses


@dataclass(frozen=True, eq=False)
class Series:
    """Files of rising size.

    Args:
        points: of each file.
        seconds: of this process's processors: those of a busy machine's clock would say nothing.
        contents: of each file.
        compressor: that made them.
        chosen: the operating point of each file.
    """

    points: tuple[Point, ...]
    seconds: float
    contents: tuple[Contents, ...]
    compressor: Compressor[Any]
    chosen: tuple[OperatingPoint, ...]


def series(subject: Subject, known: Calibrated) -> Series:
    """The library's files of the subject's damages."""
    start = time.process_time()
    compressor = known.compressor()
    chosen = tuple(compressor.at_damage(damage) for damage in subject.damages)
    built = [compressor.build(point) for point in chosen]
    seconds = time.process_time() - start
    contents = tuple(contents_of(model) for model in built)
    points = tuple(Point(size(c), subject.losses(model)) for c, model in zip(contents, built, strict=True))
    return Series(points, seconds, contents, compressor, chosen)


def size(contents: Contents) -> int:
    return len(storage.to_bytes(contents))


def point(subject: Subject, known: Calibrated, contents: Contents) -> Point:
    model = quantized.assemble(known.model_tensors, contents, Profile(this_machine()))
    return Point(size(contents), subject.losses(model))


def saved(having: Sequence[Point], lacking: Sequence[Point], loss: str) -> float:
    """The share of bytes that a refinement saves at equal loss, the mean over the files that have it.

    The bytes of the files that lack it are interpolated, and continued beyond their ends, in logarithms of both.
    """
    known = sorted((np.log(p.losses[loss]), np.log(p.nbytes)) for p in lacking)
    x, y = (np.array(values) for values in zip(*known, strict=True))
    ratios = []
    for p in having:
        at = np.log(p.losses[loss])
        i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
        slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
        ratios.append(np.log(p.nbytes) - (y[i] + slope * (at - x[i])))
    return 1 - float(np.exp(np.mean(ratios)))
