"""About how large and slow the result of a fit will be, before any work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pared.files.remote.urls import source_at
from pared.fitting.calibration import observe
from pared.fitting.config import PostTrainingQuantConfig, configured
from pared.fitting.rounding import encoding, plan
from pared.fitting.search.free.units import nbytes_at_eight_bits
from pared.fitting.streamed.fit import check_options
from pared.fitting.streamed.inputs import calls_of, samples_of
from pared.fitting.streamed.parts.opening import opened
from pared.fitting.streamed.timing import seconds_of_a_call
from pared.fitting.verification.arguments import check_arguments, check_described_model, of_model
from pared.fitting.verification.weights import check_weights
from pared.model import calls
from pared.model.checks import supported_tensors
from pared.model.contents import Decision
from pared.model.copies import check_copyable
from pared.model.tensors import ModelTensors
from pared.runtime.layers.table import check_registered
from pared.switches import random_states_kept
from pared.targets.table import OWN, TARGETS


@dataclass(frozen=True)
class Estimate:
    """What `fit` would make at 8 bits, estimated from samples of the weights.

    Args:
        nbytes: about the size of `best_model.pt` in bytes; at most `max_size`.
        original_nbytes: the size of the model's tensors as they are, in bytes.
        seconds: about the time that `fit` would take with `quant_level=0` and without evaluations.
    """

    nbytes: int
    original_nbytes: int
    seconds: float


# About the bytes of an index: for each tensor, and for everything else.
_PER_TENSOR = 70
_ENVELOPE = 1500
# An estimate rounds this many evenly spaced rows of each tensor.
_SAMPLED_ROWS = 64


@random_states_kept()
def estimate(
    model: nn.Module | str | Path,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | str | Path | None = None,
) -> Estimate:
    """Estimate the size of the file and the time that `fit` takes, from a few rows of each tensor and one batch.

    Args:
        model: a float model on the CPU, which is left exactly as it is; or the path of a Hugging Face folder, whose
            model is then in memory one block at a time. The time is then that of rounding and of both sweeps, of which
            one block is run; to choose among more than 8 bits takes longer.
        conf: as for `fit`.
        calib_dataloader: as for `fit`; only its first batch is read, to estimate the time of calibration.

    Raises:
        ParedError: as `fit` does.

    >>> guess = estimate(nn.Linear(256, 256))
    >>> guess.nbytes < 0.4 * guess.original_nbytes
    True
    """
    conf = configured(conf)
    if isinstance(model, str | Path):
        return _of_folder(source_at(model, "model"), conf, calib_dataloader)
    tensors = supported_tensors(model)
    check_registered(model)
    check_arguments(conf, calib_dataloader)
    calibration = of_model("pared.estimate", calib_dataloader)
    check_described_model(model, conf)
    check_copyable(model)
    elsewhere = None if conf.target == OWN else nbytes_at_eight_bits(tensors, conf, TARGETS[conf.target])
    rules = conf.rules if elsewhere is None else ()
    decisions = plan.make_plan(tensors, rules, strict=conf.strict and elsewhere is None)
    own, seconds = _rounded(tensors, decisions)
    if calibration is not None and conf.approach != "weight_only":
        start = time.monotonic()
        seen = observe.collect(model, calibration, 1)
        seconds += (time.monotonic() - start) * max(1.0, conf.calibration_sampling_size / seen.samples)
        check_weights(tensors, seen.calls)
    return _estimate(tensors, conf, elsewhere, own, seconds)


def _of_folder(folder: Path, conf: PostTrainingQuantConfig, calibration: object) -> Estimate:
    """That of a folder's model, of which a block is in memory at a time."""
    check_arguments(conf, calibration)
    check_options(conf, folder)
    own = seconds = 0.0
    with opened(folder, conf) as (weights, blocks):
        tensors = weights.tensors
        elsewhere = None if conf.target == OWN else nbytes_at_eight_bits(tensors, conf, TARGETS[conf.target])
        rules = conf.rules if elsewhere is None else ()
        if calibration is not None:
            first = calls_of(calibration, folder, tensors.model, 1)
            times = max(1.0, conf.calibration_sampling_size / samples_of(first))
            seconds = times * seconds_of_a_call(weights, blocks, first[0])
        for names in (*blocks.tensors, blocks.outside):
            for group in weights.groups(names):
                with weights.loaded(group) as loaded:
                    strict = conf.strict and elsewhere is None
                    rounded = _rounded(loaded, plan.make_plan(loaded, rules, strict=strict, whole=tensors))
                own, seconds = own + rounded[0], seconds + rounded[1]
        return _estimate(tensors, conf, elsewhere, own, seconds)


def _rounded(tensors: ModelTensors[nn.Module], decisions: Sequence[Decision]) -> tuple[float, float]:
    """About the bytes of tensors at 8 bits, and the seconds that rounding them takes, from a few rows of each."""
    start = time.monotonic()
    guesses = [
        encoding.sample_cost(tensor, decision, _SAMPLED_ROWS)
        for tensor, decision in zip(tensors, decisions, strict=True)
    ]
    share = sum(guess.sampled for guess in guesses) / max(1, sum(named.tensor.numel() for named in tensors))
    seconds = (time.monotonic() - start) / max(share, 1e-9) if share else 0.0
    return sum(guess.nbytes for guess in guesses), seconds


def _estimate(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    elsewhere: int | None,
    own: float,
    seconds: float,
) -> Estimate:
    """The estimate, by the bytes of the tensors in a runtime's file, or else in our own."""
    nbytes = round(own) + _PER_TENSOR * len(tensors) + _ENVELOPE if elsewhere is None else elsewhere
    if isinstance(conf.max_size, int):
        nbytes = min(nbytes, conf.max_size)
    original = sum(named.tensor.numel() * named.tensor.element_size() for named in tensors)
    return Estimate(nbytes, original, seconds)
