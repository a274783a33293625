"""The public verbs: `fit`, `load`, `save`, `report`, and `estimate` for a look before any work."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pared import artifact, calls, plan, search, stats
from pared import model as quantized
from pared.candidates import choose_activations, find_candidates, time_layers
from pared.config import Approach, PostTrainingQuantConfig
from pared.contents import Contents, Stored
from pared.errors import CalibrationError, ConfigError
from pared.evaluate import EvalFunc
from pared.layers import Activation
from pared.progress import Stages
from pared.tensors import Slot, check_supported, find_tensors
from pared.version import __version__

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# A rate below this leaves nothing of a model.
_LEAST_BITS = 0.25


def fit(
    model: ModuleT,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    *,
    quiet: bool = False,
) -> ModuleT:
    """Compress a model.

    Args:
        model: a float model on the CPU; it is left exactly as it is.
        conf: what is wanted; default: 8 bits everywhere, int8 wherever it is accurate and faster.
        calib_dataloader: an iterable of batches (a tensor, a tuple or list of arguments, a dict of keyword
            arguments), read once; or a callable that is given the model and calls it. Without it no range is known
            and no layer can be timed: weights are compressed, and everything runs in float unless
            `approach="dynamic"` is asked for.
        eval_func: scores a model: a number, or a one-dimensional array with a score per sample. It is called on the
            float model and on each candidate. With an array, the search sees the even samples, and the odd ones
            confirm the result.
        confirm_func: the same on other data, to confirm the result.
        quiet: show no progress, even at a terminal.

    Returns:
        a model of a subclass of the original's class, in eval mode, its parameters frozen. `q.met`, `q.score` and
        `q.baseline` say how it went, `q.report()` what became of each tensor, `q.save(directory)` writes it.

    What decides:

    | given | result |
    |---|---|
    | neither `eval_func` nor `max_size` | 8 bits everywhere |
    | `max_size` | the greatest rate, the same for all tensors, at which the file is within the bytes |
    | `eval_func` | static, then dynamic, then weight-only, until the criterion is met |
    | both | the rate that `max_size` allows; `met` says whether the criterion is met within it |

    Raises:
        ModelError: the model cannot be compressed (lazy, scripted, quantized already, NaN weights).
        ConfigError: a rule matches nothing, or the options contradict each other.
        CalibrationError: the calibration data are missing, empty, ambiguous, or do not fit.
        EvaluationError: `eval_func` raised, or returned no number.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = fit(net, calib_dataloader=[torch.randn(16, 64)])
    >>> small.state_dict()["0.weight"].dtype, isinstance(small, nn.Sequential)
    (torch.int8, True)
    """
    conf = conf or PostTrainingQuantConfig()
    check_supported(model)
    _check_arguments(conf, calib_dataloader, eval_func, confirm_func)
    stages = Stages(quiet=quiet)
    slots = find_tensors(model)
    plan.make_plan(model, slots, conf.rules, strict=conf.strict)  # a wrong rule is reported before any work
    with stages.stage("calibrating"):
        seen = _calibrate(model, conf, calib_dataloader)
    with stages.stage("rounding weights"):
        stored = _round(model, slots, conf)
    make = _Factory(model, stored, seen, conf)
    rungs = search.LADDER[_approach(conf, seen)]
    if eval_func is None:
        with stages.stage("building"):
            built = make(rungs[0])
            assert built is not None
            return built
    with stages.stage("searching"):
        judge = search.Judge(conf.accuracy_criterion, eval_func, confirm_func, conf.max_trials, conf.timeout)
        return search.climb(rungs, make, stats.shadow(model), judge)


def load(path: str | Path, model: ModuleT) -> ModuleT:
    """Load a quantized model.

    Args:
        path: the directory that `save` wrote, or the artifact itself.
        model: the architecture: any instance of it, on the CPU or on the meta device. Its numbers are not used, and
            it is left as it is.

    Returns:
        the quantized model. Which layers run in int8 is taken from `engine.json` beside the artifact if that was
        measured on an equal machine; else all that the artifact allows.

    Raises:
        FileError: there is no artifact there, or it cannot be read.
        CorruptError, UnsafeError, VersionError: its bytes contradict themselves, would inflate without bound, or were
            written by a newer version.
        MismatchError: it belongs to another architecture.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}",
            where="pared.load",
            remedy="Pass an instance of the architecture: pared.load(directory, model=build_model()).",
        )
    file = artifact.find(path)
    contents = artifact.read(file)
    return quantized.assemble(model, contents, quantized.profile_beside(file))


def _check_arguments(conf: object, calibration: object, eval_func: object, confirm_func: object) -> None:
    if not isinstance(conf, PostTrainingQuantConfig):
        raise ConfigError(
            f"conf is a {type(conf).__name__}",
            where="pared.fit",
            remedy="Pass a PostTrainingQuantConfig(...).",
        )
    for name, function in (("eval_func", eval_func), ("confirm_func", confirm_func)):
        if function is not None and not callable(function):
            raise ConfigError(
                f"{name} is a {type(function).__name__}, which cannot be called",
                where="pared.fit",
                remedy=f"Pass a function: {name}(model) returns a number.",
            )
    if confirm_func is not None and eval_func is None:
        raise ConfigError(
            "confirm_func without eval_func confirms nothing",
            where="pared.fit",
            remedy="Pass eval_func as well.",
        )
    if conf.approach == "static" and calibration is None:
        raise CalibrationError(
            'approach="static" needs calibration data, and there are none',
            where="pared.fit",
            remedy='Pass calib_dataloader, or choose approach="dynamic" or "weight_only".',
        )


def _calibrate(
    model: nn.Module, conf: PostTrainingQuantConfig, calibration: calls.Calibration | None
) -> stats.Statistics | None:
    if calibration is None or conf.approach == "weight_only":
        return None
    return stats.collect(model, calibration, conf.calibration_sampling_size)


def _approach(conf: PostTrainingQuantConfig, seen: stats.Statistics | None) -> Approach:
    """Without calibration nothing is known of the activations, so "auto" leaves them alone."""
    return "weight_only" if seen is None and conf.approach == "auto" else conf.approach


def _round(model: nn.Module, slots: Sequence[Slot], conf: PostTrainingQuantConfig) -> tuple[Stored, ...]:
    """Every tensor in its format: at 8 bits, or at the greatest rate at which the file is within `max_size`."""
    stored = _at(model, slots, conf, plan.DEFAULT_BITS)
    assert conf.max_size is None or isinstance(conf.max_size, int)
    if conf.max_size is None or _file_bytes(stored) <= conf.max_size:
        return stored
    low, high = _LEAST_BITS, plan.DEFAULT_BITS
    stored = _at(model, slots, conf, low)
    if _file_bytes(stored) > conf.max_size:
        raise ConfigError(
            f"max_size is {conf.max_size:,} bytes, and even at {low} bits per weight the file takes "
            f"{_file_bytes(stored):,}",
            where="PostTrainingQuantConfig",
            remedy="Allow more bytes, or give rules to the tensors that are left in float.",
        )
    while high - low > 0.02:
        middle = (low + high) / 2
        tried = _at(model, slots, conf, middle)
        if _file_bytes(tried) <= conf.max_size:
            low, stored = middle, tried
        else:
            high = middle
    return stored


def _at(model: nn.Module, slots: Sequence[Slot], conf: PostTrainingQuantConfig, bits: float) -> tuple[Stored, ...]:
    decisions = plan.make_plan(model, slots, conf.rules, bits=bits, strict=conf.strict)
    return tuple(
        Stored(slot.names, slot.kind, plan.encode(slot, decision), decision)
        for slot, decision in zip(slots, decisions, strict=True)
    )


# What an index may say of one tensor's activation, and of versions and scores, beyond what is known while rounding.
_ROOM_PER_TENSOR = 64
_ROOM = 1024


def _file_bytes(stored: Sequence[Stored]) -> int:
    return len(artifact.to_bytes(Contents(tuple(stored)))) + _ROOM_PER_TENSOR * len(stored) + _ROOM


class _Factory(Generic[ModuleT]):
    """Builds the quantized model of each rung from one rounding and one set of statistics."""

    def __init__(
        self,
        model: ModuleT,
        stored: tuple[Stored, ...],
        seen: stats.Statistics | None,
        conf: PostTrainingQuantConfig,
    ) -> None:
        self._model = model
        self._stored = stored
        self._candidates = find_candidates(model, stored, seen.inputs if seen else None)
        self._provenance: dict[str, Any] = {
            "pared": __version__,
            "torch": str(torch.__version__),
            "calibration_samples": seen.samples if seen else 0,
            "seed": conf.seed,
        }
        self._made: list[dict[str, Activation]] = []

    def __call__(self, rung: Approach) -> ModuleT | None:
        """The model of a rung; None if it would equal an earlier one."""
        activations = choose_activations(self._candidates, rung)
        if activations in self._made:
            return None
        self._made.append(activations)
        profile = time_layers(self._candidates, activations)
        contents = Contents(self._stored, activations, {**self._provenance, "approach": rung})
        return quantized.assemble(self._model, contents, profile)


@dataclass(frozen=True)
class Estimate:
    """What `fit` would give, from a look at samples of the weights.

    Args:
        nbytes: of `best_model.pt`, about.
        original_nbytes: of the model's tensors as they are.
        seconds: that `fit` would take without evaluations, about.
    """

    nbytes: int
    original_nbytes: int
    seconds: float


# An estimate rounds this many evenly spaced rows of each tensor.
_SAMPLED_ROWS = 64


def estimate(
    model: nn.Module,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
) -> Estimate:
    """Predict bytes and seconds before any work: rounds a few rows of each tensor and runs one calibration batch.

    Args:
        model: as for `fit`.
        conf: as for `fit`.
        calib_dataloader: as for `fit`; one batch is read.

    Raises:
        ParedError: as `fit`.

    >>> guess = estimate(nn.Linear(256, 256))
    >>> guess.nbytes < 0.4 * guess.original_nbytes
    True
    """
    conf = conf or PostTrainingQuantConfig()
    check_supported(model)
    _check_arguments(conf, calib_dataloader, None, None)
    slots = find_tensors(model)
    decisions = plan.make_plan(model, slots, conf.rules, strict=conf.strict)
    start = time.monotonic()
    guesses = [plan.sample_cost(slot, decision, _SAMPLED_ROWS) for slot, decision in zip(slots, decisions, strict=True)]
    share = sum(guess.sampled for guess in guesses) / max(1, sum(slot.tensor.numel() for slot in slots))
    rounding = (time.monotonic() - start) / max(share, 1e-9) if share else 0.0
    calibrating = 0.0
    if calib_dataloader is not None and conf.approach != "weight_only":
        start = time.monotonic()
        seen = stats.collect(model, calib_dataloader, 1)
        calibrating = (time.monotonic() - start) * max(1.0, conf.calibration_sampling_size / seen.samples)
    nbytes = round(sum(guess.nbytes for guess in guesses)) + _ROOM_PER_TENSOR * len(slots) + _ROOM
    if isinstance(conf.max_size, int):
        nbytes = min(nbytes, conf.max_size)
    original = sum(slot.tensor.numel() * slot.tensor.element_size() for slot in slots)
    return Estimate(nbytes, original, rounding + calibrating)
