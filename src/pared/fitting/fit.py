"""The public verbs: `fit`, `load`, `trade_off`, and `estimate` for a look before any work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pared.artifact.outcome import Curve
from pared.files.disk import as_path
from pared.fitting import speed
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.perturbation import perturb
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.estimate import check_arguments
from pared.fitting.module_damage import try_modules
from pared.fitting.rounding import plan
from pared.fitting.search import search
from pared.fitting.search import trade_off as curve
from pared.fitting.search.activations import choose_activations, find_candidates
from pared.fitting.search.compressor import DEFAULT_DAMAGE, Compressor, provenance
from pared.fitting.search.evaluate import EvalFunc
from pared.fitting.search.workspace import Workspace, checksum
from pared.formats.views import view_of
from pared.model import calls, copies
from pared.model.checks import check_supported
from pared.model.contents import Contents, Stored
from pared.model.tensors import ModuleT, Slot, find_tensors
from pared.runtime import quantized
from pared.runtime.layers.registration import check_registered
from pared.runtime.layers.registry import weights_of
from pared.runtime.profile import Profile, this_machine
from pared.runtime.record import record_of
from pared.scalars import checked_number
from pared.terminal import Stages
from pared.version import __version__

log = logging.getLogger(__name__)


# The damage that rounding the inputs of layers may do at 8 bits, the price of int8 kernels: a tenth of a percent, as
# for the search, would leave layers in float and most inputs to the slower dynamic mode.
_INPUTS_AT_EIGHT_BITS: Final = 4e-3
_SAMPLES_AT_EIGHT_BITS: Final = 32  # enough to know what inputs and steps of 8 bits cost


def fit(
    model: ModuleT,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    *,
    workspace: str | Path | None = None,
    quiet: bool = False,
) -> ModuleT:
    """Compress a model: the smallest file that keeps the accuracy, or the most accurate one of a size.

    Args:
        model: a float model on the CPU; it is left exactly as it is.
        conf: what is wanted; default: the damage that costs 0.1 % of the output's energy.
        calib_dataloader: an iterable of batches (a tensor, a tuple or list of arguments, a dict of keyword
            arguments), read once; or a callable that is given the model and calls it. It tells what errors cost.
            Without it every tensor's relative error counts alike, and everything runs in float unless
            `approach="dynamic"` is asked for.
        eval_func: scores a model: a number, or a one-dimensional array with a score per sample. It is called on the
            float model and on each candidate. With an array, the search sees the even samples, and the odd ones
            confirm the result: within two standard errors of them, and within the tolerable loss on all together.
        confirm_func: the same on other data, to confirm the result.
        workspace: a directory for the records of the search: the same call goes on where an earlier one was killed.
        quiet: show no progress, even at a terminal.

    Returns:
        a model of a subclass of the original's class, in eval mode, its parameters frozen. `q.met`, `q.score` and
        `q.baseline` say how it went, `q.report()` what became of each tensor, `q.save(directory)` writes it.

    What decides:

    | given | result |
    |---|---|
    | neither `eval_func` nor `max_size` | `quant_level=0`, or no calibration: 8 bits everywhere; else 0.1 % of damage |
    | `max_size` | the least damage predicted for a file within the bytes |
    | `eval_func` | the smallest file that meets the criterion; `quant_level=0`: with nothing coarser than 8 bits |
    | both | the smallest that meets it; if that exceeds `max_size`, the best within it, and `met` is False |

    Raises:
        ModelError: the model cannot be compressed (lazy, scripted, quantized already, NaN weights).
        ConfigError: a rule matches nothing, the options contradict each other, no file is as small as `max_size`, or
            the workspace belongs to another search.
        CalibrationError: the calibration data are missing, empty, ambiguous, or do not fit.
        EvaluationError: `eval_func` raised, or returned no number.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = fit(net, calib_dataloader=[torch.randn(16, 64)])
    >>> small.state_dict()["0.weight"].dtype, isinstance(small, nn.Sequential)
    (torch.int8, True)
    """
    conf = PostTrainingQuantConfig() if conf is None else conf
    directory = None if workspace is None else as_path(workspace, "workspace")
    at_eight_bits = conf.quant_level == 0 and conf.max_size is None and eval_func is None
    job = _Job.begin(model, conf, calib_dataloader, (eval_func, confirm_func), quiet, at_eight_bits)
    if eval_func is None:
        alone: ModuleT = job.timed(job.without_evaluation())
        return alone
    compressor = job.compressor()
    start = compressor.most if conf.quant_level == 0 else DEFAULT_DAMAGE
    records = Workspace(directory, job.fingerprint()) if directory is not None else None
    judge = search.Judge(conf.accuracy_criterion, eval_func, confirm_func, conf.max_trials, conf.timeout)
    with job.stages.stage("searching"):
        found = search.search(
            compressor, copies.shadow(model), judge, max_size=job.max_size, workspace=records, start=start
        )
    traced: ModuleT = job.traced_and_timed(found, compressor)
    return traced


def trade_off(
    model: nn.Module,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
    eval_func: EvalFunc | None = None,
    *,
    points: int = 8,
    quiet: bool = False,
) -> Curve:
    """The trade-off curve: bytes against damage, and the score where there is an `eval_func`, from one calibration.

    Args:
        model: as for `fit`.
        conf: as for `fit`; the criterion and `max_size` play no part.
        calib_dataloader: as for `fit`.
        eval_func: as for `fit`.
        points: how many models; with `eval_func` each is built and scored.
        quiet: show no progress, even at a terminal.

    Raises:
        ParedError: as `fit`.

    >>> found = trade_off(nn.Linear(64, 64), calib_dataloader=[torch.randn(16, 64)], points=3)
    >>> [a.nbytes > b.nbytes for a, b in zip(found.points, found.points[1:])]
    [True, True]
    """
    conf = PostTrainingQuantConfig() if conf is None else conf
    points = checked_number("pared.trade_off", "points", points, least=1, whole=True)
    job = _Job.begin(model, conf, calib_dataloader, (eval_func, None), quiet)
    judge = search.Judge(conf.accuracy_criterion, eval_func) if eval_func is not None else None
    compressor = job.compressor()
    with job.stages.stage("tracing"):
        return curve.trace(compressor, copies.shadow(model), judge, points=points)


@dataclass(frozen=True, eq=False)
class _Job:
    """One call of `fit`: everything that is known before models are made."""

    model: Any
    conf: PostTrainingQuantConfig
    slots: Sequence[Slot]
    seen: Statistics | None
    sensitivity: Sensitivity | None
    stages: Stages
    evaluated: bool
    at_eight_bits: bool

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        conf: PostTrainingQuantConfig,
        calibration: calls.Calibration | None,
        functions: tuple[EvalFunc | None, EvalFunc | None],
        quiet: bool,
        at_eight_bits: bool = False,
    ) -> _Job:
        check_supported(model)
        check_registered(model)
        check_arguments(conf, calibration, *functions)
        stages = Stages(quiet=quiet)
        slots = find_tensors(model)
        plan.make_plan(model, slots, conf.rules, strict=conf.strict)  # a wrong rule is reported before any work
        seen = measured = None
        if calibration is not None:
            with stages.stage("calibrating"):
                seen = observe.collect(model, calibration, conf.calibration_sampling_size)
            with stages.stage("measuring what errors cost"):
                some = seen.some(_SAMPLES_AT_EIGHT_BITS) if at_eight_bits else seen
                rounds = max(1, _SAMPLES_AT_EIGHT_BITS // max(some.samples, 2)) if at_eight_bits else None
                measured = sensitivity.measure(model, some.calls, some.energies, conf.seed, rounds=rounds)
                if measured is None:
                    measured = perturb(model, some.calls, conf.seed)
                if conf.approach in ("auto", "dynamic"):
                    measured = replace(measured, inputs={**measured.inputs, **try_modules(model, slots, seen)})
        return cls(model, conf, slots, seen, measured, stages, functions[0] is not None, at_eight_bits)

    @property
    def max_size(self) -> int | None:
        assert self.conf.max_size is None or isinstance(self.conf.max_size, int)  # the configuration has parsed it
        return self.conf.max_size

    def compressor(self) -> Compressor[Any]:
        with self.stages.stage("measuring what steps cost"):
            return Compressor(self.model, self.slots, self.conf, self.seen, self.sensitivity, obey=not self.evaluated)

    def without_evaluation(self) -> nn.Module:
        """The model that the configuration alone decides."""
        if self.at_eight_bits or (self.max_size is None and self.seen is None):
            with self.stages.stage("rounding weights"):
                return self._eight_bits()
        compressor = self.compressor()
        with self.stages.stage("rounding weights"):
            if self.max_size is None:
                if compressor.least > DEFAULT_DAMAGE:
                    log.warning("no formats do less damage than %.2g of the output's energy", compressor.least)
                point = compressor.at_damage(max(DEFAULT_DAMAGE, compressor.least))
            else:
                point = compressor.within_bytes(self.max_size)
            built: nn.Module = compressor.build(point)
            record_of(built).curve = curve.trace(compressor, self.model)
            return built

    def _eight_bits(self) -> nn.Module:
        conf = self.conf
        decisions = plan.make_plan(self.model, self.slots, conf.rules, strict=conf.strict)
        if self.sensitivity is not None:
            decisions = plan.finer(decisions, self.slots, self.sensitivity.tensors, strict=conf.strict)
        stored = tuple(
            Stored(slot.names, slot.kind, plan.encode(slot, decision), decision)
            for slot, decision in zip(self.slots, decisions, strict=True)
        )
        candidates = find_candidates(self.model, stored, self.seen.inputs if self.seen else None)
        noise = self.sensitivity.inputs if self.sensitivity else {}
        approach = "weight_only" if self.seen is None and conf.approach == "auto" else conf.approach
        budget = _INPUTS_AT_EIGHT_BITS if approach == "auto" else float("inf")
        activations = choose_activations(candidates, approach, noise, budget)
        contents = Contents(stored, activations, provenance(conf, self.seen))
        built: nn.Module = quantized.assemble(self.model, contents, Profile(this_machine()))
        return built

    def traced_and_timed(self, found: Any, compressor: Compressor[Any]) -> Any:
        """What a search found, with its curve and in its fastest form; Ctrl-C leaves out what is not done yet."""
        record = record_of(found)
        record.curve = Curve(()).scored(record.outcome)  # the trials alone
        try:
            record.curve = curve.trace(compressor, self.model).scored(record.outcome)
            return self.timed(found)
        except KeyboardInterrupt:
            log.warning("interrupted: the model is returned without what was still to be measured of it")
            return found

    def timed(self, found: Any) -> Any:
        """The same model, in the form that is fastest here."""
        contents = quantized.contents_of(found)
        if self.seen is None or self.conf.approach == "weight_only":
            return found
        with self.stages.stage("timing"):
            return speed.kept(found, speed.tuned(self.model, contents, self.seen))

    def fingerprint(self) -> dict[str, str]:
        """What a search depends on, as far as it can be told."""
        conf = replace(self.conf, max_trials=1, timeout=0, rules=())
        # What rules and registered layers say, by what comes of it: functions cannot be told apart.
        decisions = plan.make_plan(self.model, self.slots, self.conf.rules, bits=None, strict=self.conf.strict)
        views = [view_of(slot.module, slot.attribute, tuple(slot.tensor.shape)).rows for slot in self.slots]
        decided = [(one.name, one.treatment, one.bits, rows) for one, rows in zip(decisions, views, strict=True)]
        int8 = [(name, weights_of(module)) for name, module in self.model.named_modules()]
        return {
            "pared": __version__,
            "torch": str(torch.__version__),
            "model": checksum(slot.tensor for slot in self.slots),
            "calibration": checksum(
                tree_leaves([(c.args, dict(c.kwargs)) for c in self.seen.calls]) if self.seen else ()
            ),
            "configuration": repr(conf),
            "decisions": checksum([decided, int8]),
        }
