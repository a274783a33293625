"""How long both sweeps will take, from one block and one call."""

from __future__ import annotations

import time
from functools import partial

import torch

from pared.fitting.calibration.gathering.gradients import Gathering
from pared.fitting.streamed.parts.blocks import ModelBlocks, differentiated, of_batch
from pared.fitting.streamed.parts.chain import Chain
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.shards.runs import KINDS
from pared.model.calls import Call, explaining, guarded
from pared.switches import ignoring


def seconds_of_a_call(weights: Weights, blocks: ModelBlocks, call: Call) -> float:
    """About the seconds that all blocks take in both sweeps for a call; those of the first one are measured.

    Args:
        weights: those of the model.
        blocks: how it is divided.
        call: the first of calibration.

    Raises:
        CalibrationError: the model raises something.
        NotInBlocks: it does not pass a stream through its blocks, or has no gradient.
    """
    model = weights.tensors.model
    chain = Chain(model, blocks)
    with (
        weights.around({*blocks.outside, *blocks.tensors[0]}),
        explaining(model, (call.args, dict(call.kwargs)), of_batch(0)),
    ):
        guarded(partial(chain.learn, call), of_batch(0))
    with weights.around(blocks.outside, traced=True):
        entering, arguments = guarded(partial(chain.start, call), of_batch(0))
    run = partial(chain.block, 0, entering, arguments)

    def differentiate() -> None:
        with torch.enable_grad(), ignoring():
            left = gathering.watched(run)
            gathering.along([left], [torch.ones_like(left)], unseen=False, also=[entering])

    with weights.loaded(blocks.tensors[0]) as loaded:
        began = time.monotonic()
        with torch.no_grad(), ignoring():
            guarded(run, of_batch(0, 0))
        gathering = Gathering(loaded, KINDS)
        entering.requires_grad_(True)
        differentiated(differentiate, of_batch(0, 0), model)
        return (time.monotonic() - began) * len(blocks)
