"""Traces the trade-off curve: bytes, damage and score at several operating points."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Final

from pared.allocate import Choice
from pared.artifact.outcome import Curve, Point
from pared.errors import ConfigError
from pared.fitting.search.evaluate import evaluate
from pared.fitting.search.maker import Maker
from pared.fitting.search.search import Judge

log = logging.getLogger(__name__)

# Damages from where nobody can tell the models apart to where most of them are no longer of use.
SPAN: Final = (1e-5, 0.1)


def trace(
    compressor: Maker[Any],
    judge: Judge | None = None,
    *,
    points: int = 8,
    span: tuple[float, float] = SPAN,
) -> Curve:
    """Trace the trade-off between bytes and damage.

    Args:
        compressor: makes the models, all from one set of statistics.
        judge: its `eval_func` scores the float model, and each model. If None, nothing is built, and bytes are the
            planned ones.
        points: how many operating points to try, evenly spaced in log damage; equal plans are one point of the curve.
        span: the least and the most damage, moved into the range that the compressor reaches.

    Returns:
        the curve. Ctrl-C ends it with the points so far.

    Raises:
        ConfigError: `points` is below 1, or the span is empty or not positive.
        EvaluationError: `eval_func` raised, or returned no score.
        KeyboardInterrupt: Ctrl-C before the first point.
    """
    if points < 1 or not 0 < span[0] <= span[1]:
        raise ConfigError(
            f"{points} points between damages {span[0]:g} and {span[1]:g} make no curve",
            where="curve",
            remedy="Ask for at least one point, and for 0 < least <= most.",
        )
    baseline = None
    if judge is not None:
        with compressor.original() as original:
            baseline = evaluate(judge.eval_func, original).value

    def reachable(damage: float) -> float:
        return min(max(damage, compressor.least), compressor.most)

    low, high = (math.log(reachable(damage)) for damage in span)
    log_damages = [low + (high - low) * i / max(1, points - 1) for i in range(points)]
    traced: list[Point] = []
    known: set[Choice] = set()
    try:
        for log_damage in log_damages:
            operating_point = compressor.at_damage(reachable(math.exp(log_damage)))
            if operating_point.choice in known:
                continue
            known.add(operating_point.choice)
            began = time.monotonic()
            nbytes, score = operating_point.nbytes, None
            if judge is not None:
                made = compressor.build(operating_point)
                nbytes = compressor.nbytes_of(operating_point, made)
                with compressor.candidate(made) as model:
                    score = evaluate(judge.eval_func, model).value
            seconds = time.monotonic() - began
            traced.append(Point(operating_point.price, operating_point.damage, nbytes, score, seconds))
            log.info("point %d: %s", len(traced), traced[-1])
    except KeyboardInterrupt:
        if not traced:
            raise
        log.warning("interrupted: the curve has %d points", len(traced))
    return Curve(tuple(traced), baseline)
