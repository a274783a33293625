"""Before any work: whether the arguments of `fit` are right, and about how large and slow the result will be."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import nn

from pared.errors import CalibrationError, ConfigError
from pared.fitting.calibration import observe
from pared.fitting.config import OWN, PostTrainingQuantConfig, configured
from pared.fitting.rounding import encoding, plan
from pared.fitting.search.free.units import nbytes_at_eight_bits
from pared.fitting.verification.weights import check_weights
from pared.model import calls
from pared.model.checks import supported_tensors
from pared.model.copies import check_copyable
from pared.runtime.layers.table import check_registered
from pared.switches import random_states_kept
from pared.targets.installed import check_installed
from pared.targets.table import TARGETS


def check_arguments(
    conf: PostTrainingQuantConfig, calibration: object, eval_func: object = None, confirm_func: object = None
) -> None:
    """Refuse arguments of `fit` that have a wrong type or contradict each other.

    Raises:
        ConfigError: `eval_func` or `confirm_func` has a wrong type, or `confirm_func` stands alone; or the target's
            packages are missing.
        CalibrationError: `approach="static"` without calibration data.
    """
    if conf.target != OWN:
        check_installed(TARGETS[conf.target])
    for name, function in (("eval_func", eval_func), ("confirm_func", confirm_func)):
        if function is not None and not callable(function):
            raise ConfigError(
                f"{name} is a {type(function).__name__}, which cannot be called",
                where="pared.fit",
                remedy=f"Pass a function: {name}(model) returns a number.",
            )
    if confirm_func is not None and eval_func is None:
        raise ConfigError(
            "there is a confirm_func but no eval_func",
            where="pared.fit",
            remedy="Pass eval_func as well.",
        )
    if conf.approach == "static" and calibration is None:
        raise CalibrationError(
            'approach="static" needs calibration data, and there are none',
            where="pared.fit",
            remedy='Pass calib_dataloader, or choose approach="dynamic" or "weight_only".',
        )


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
    model: nn.Module,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
) -> Estimate:
    """Estimate the size of the file and the time that `fit` takes, from a few rows of each tensor and one batch.

    Args:
        model: a float model on the CPU. It is left exactly as it is.
        conf: as for `fit`.
        calib_dataloader: as for `fit`; only its first batch is read, to estimate the time of calibration.

    Raises:
        ParedError: as `fit` does.

    >>> guess = estimate(nn.Linear(256, 256))
    >>> guess.nbytes < 0.4 * guess.original_nbytes
    True
    """
    conf = configured(conf)
    tensors = supported_tensors(model)
    check_registered(model)
    check_arguments(conf, calib_dataloader)
    check_copyable(model)
    elsewhere = None if conf.target == OWN else nbytes_at_eight_bits(tensors, conf, TARGETS[conf.target])
    rules = conf.rules if elsewhere is None else ()
    decisions = plan.make_plan(tensors, rules, strict=conf.strict and elsewhere is None)
    start = time.monotonic()
    guesses = [
        encoding.sample_cost(tensor, decision, _SAMPLED_ROWS)
        for tensor, decision in zip(tensors, decisions, strict=True)
    ]
    share = sum(guess.sampled for guess in guesses) / max(1, sum(named.tensor.numel() for named in tensors))
    rounding = (time.monotonic() - start) / max(share, 1e-9) if share else 0.0
    calibrating = 0.0
    if calib_dataloader is not None and conf.approach != "weight_only":
        start = time.monotonic()
        seen = observe.collect(model, calib_dataloader, 1)
        calibrating = (time.monotonic() - start) * max(1.0, conf.calibration_sampling_size / seen.samples)
        check_weights(tensors, seen.calls)
    own = round(sum(guess.nbytes for guess in guesses)) + _PER_TENSOR * len(tensors) + _ENVELOPE
    nbytes = own if elsewhere is None else elsewhere
    if isinstance(conf.max_size, int):
        nbytes = min(nbytes, conf.max_size)
    original = sum(named.tensor.numel() * named.tensor.element_size() for named in tensors)
    return Estimate(nbytes, original, rounding + calibrating)
