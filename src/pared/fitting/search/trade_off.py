"""The trade-off curve traced: bytes against damage and score for several damages."""

from __future__ import annotations

import logging
import math
import time
from typing import Final

from torch import nn

from pared.artifact.outcome import Curve, Point
from pared.errors import ConfigError
from pared.fitting.search.allocate import Choice
from pared.fitting.search.compressor import Compressor
from pared.fitting.search.evaluate import evaluate
from pared.fitting.search.search import Judge
from pared.runtime import quantized

log = logging.getLogger(__name__)

# From where nobody can tell the models apart to where most are of no more use.
SPAN: Final = (1e-5, 0.1)


def trace(
    compressor: Compressor[nn.Module],
    original: nn.Module,
    judge: Judge | None = None,
    *,
    points: int = 8,
    span: tuple[float, float] = SPAN,
) -> Curve:
    """Follow the trade-off between bytes and damage.

    Args:
        compressor: makes the models, all from one set of statistics.
        original: the float model, in eval mode; scored once.
        judge: whose `eval_func` scores each model; None: nothing is built, and bytes are planned ones.
        points: how many, evenly spaced in log damage; fewer if the compressor has no more different plans.
        span: the least and the most damage, as far as the compressor offers them.

    Returns:
        the curve. Ctrl-C ends it with the points so far.

    Raises:
        ConfigError: no points, or a span that is none.
        EvaluationError: `eval_func` raised, or gave no score.
    """
    if points < 1 or not 0 < span[0] <= span[1]:
        raise ConfigError(
            f"{points} points between damages {span[0]:g} and {span[1]:g} make no curve",
            where="curve",
            remedy="Ask for one point at least, and for 0 < least <= most.",
        )
    baseline = evaluate(judge.eval_func, original).value if judge is not None else None
    low, high = (math.log(min(max(damage, compressor.least), compressor.most)) for damage in span)
    wanted = [math.exp(low + (high - low) * i / max(1, points - 1)) for i in range(points)]
    found: list[Point] = []
    known: set[Choice] = set()
    try:
        for damage in wanted:
            offer = compressor.offer(min(max(damage, compressor.least), compressor.most))
            if offer.choice in known:
                continue
            known.add(offer.choice)
            began = time.monotonic()
            nbytes, score = offer.nbytes, None
            if judge is not None:
                model = compressor.build(offer)
                nbytes, score = quantized.nbytes(model), evaluate(judge.eval_func, model).value
            found.append(Point(offer.price, offer.damage, nbytes, score, time.monotonic() - began))
            log.info("point %d: %s", len(found), found[-1])
    except KeyboardInterrupt:
        if not found:
            raise
        log.warning("interrupted: the curve has %d points", len(found))
    return Curve(tuple(found), baseline)
