"""SmolLM2-135M within an average of bits over all of its weights, in pared's own file, calibrated on news."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.targets import formats, smollm2
from bench.targets.row import Row
from bench.zoo import smollm2 as zoo
from pared.fitting.config import OWN

# The perplexity on Wikipedia to reach, by bits over all weights, also those of the table, which is the head as well.
_BARS = {3.5: 22.5, 4.0: 20.9}
_CALIBRATED = 16


def rows() -> Iterator[Row]:
    model = zoo.load(None)
    exact = smollm2.perplexity(model.state_dict())
    known = formats.prepared(model, smollm2.calibration(), OWN, _CALIBRATED)
    weights = sum(one.tensor.numel() for one in known.tensors)
    for bits, bar in _BARS.items():
        start = time.process_time()
        ours, nbytes, _ = formats.within(known, int(bits * weights / 8))
        seconds = time.process_time() - start
        score = smollm2.perplexity(ours)
        what = f"pared, {bits} bits"
        yield Row("SmolLM2", what, 8 * nbytes / weights, nbytes, "perplexity", exact, None, score, bar, seconds)
