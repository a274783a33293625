"""What `fit` knows before it makes any model: the model's tensors, what calibration saw, and what errors cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Generic

from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.logits import find_logits
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.orientation import oriented
from pared.fitting.calibration.perturbation import perturb
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.experts.balancing import balanced
from pared.fitting.experts.counting import routed
from pared.fitting.experts.finding import mixtures
from pared.fitting.inputs.moments import input_moments, with_inputs
from pared.fitting.measured.parts import of_samples, small_call
from pared.fitting.module_damage import try_modules
from pared.fitting.rounding.precision import is_clear
from pared.fitting.search.evaluate import EvalFunc
from pared.fitting.search.free.choices import check_rules
from pared.fitting.verification.arguments import check_arguments
from pared.fitting.verification.weights import check_weights
from pared.model import calls
from pared.model.checks import supported_tensors
from pared.model.copies import check_copyable
from pared.model.copying.ties import check_globals
from pared.model.tensors import ModelTensors, ModuleT
from pared.runtime.layers.table import check_registered
from pared.targets.table import OWN
from pared.terminal import Stages

_SAMPLES_AT_EIGHT_BITS: Final = 16  # enough to know what inputs and steps of 8 bits cost
_FEW_SAMPLES: Final = 4  # and for 8 bits of weights alone, where they show that nothing comes near to needing more


@dataclass(frozen=True, eq=False)
class Prepared(Generic[ModuleT]):
    """What `fit` knows before it makes any model.

    Args:
        tensors: those of the float model.
        conf: what is wanted.
        seen: what calibration saw; None without calibration data.
        sensitivity: what errors cost; None without calibration data.
    """

    tensors: ModelTensors[ModuleT]
    conf: PostTrainingQuantConfig
    seen: Statistics | None
    sensitivity: Sensitivity | None

    def without_moments(self) -> Prepared[ModuleT]:
        """The same without second moments, which take as much memory as several models; factors were made of them."""
        if self.sensitivity is None:
            return self
        tensors = {
            name: replace(stats, moments=None, unseen=None, inputs=None)
            for name, stats in self.sensitivity.tensors.items()
        }
        return replace(self, sensitivity=replace(self.sensitivity, tensors=tensors))


def prepare(
    model: ModuleT,
    conf: PostTrainingQuantConfig,
    calibration: calls.Calibration | None,
    functions: tuple[EvalFunc | None, EvalFunc | None],
    stages: Stages,
    *,
    eight_bits: bool = False,
) -> Prepared[ModuleT]:
    """Check the arguments, find the tensors, run the calibration data and measure what errors cost.

    Args:
        model: the float model, which is left as it is.
        conf: what is wanted.
        calibration: the calibration data, or None.
        functions: `eval_func` and `confirm_func`, which are only checked.
        stages: shows the progress.
        eight_bits: everything goes to 8 bits, for which a few samples and no second moments are enough.

    Raises:
        ParedError: as `fit`.
    """
    tensors = supported_tensors(model)
    check_registered(model)
    check_arguments(conf, calibration, *functions)
    check_rules(tensors, conf)  # a wrong rule is reported before any work
    check_copyable(model)
    if calibration is None:
        check_globals(model)
        return Prepared(tensors, conf, None, None)
    with stages.stage("calibrating"):
        seen = observe.collect(model, calibration, conf.calibration_sampling_size)
        check_weights(tensors, seen.calls)
        tensors = oriented(tensors, seen.calls)
        paths = {path for path, *_ in seen.energies}
        moments = {} if conf.target == OWN else input_moments(tensors, seen.calls)
        seen = replace(seen, logits=find_logits(model, small_call(model, seen), conf.logits, paths))
    with stages.stage("measuring what errors cost"):
        return Prepared(tensors, conf, seen, with_inputs(_measured(tensors, conf, seen, eight_bits), moments))


def _measured(
    tensors: ModelTensors[ModuleT], conf: PostTrainingQuantConfig, seen: Statistics, eight_bits: bool
) -> Sensitivity:
    """By gradients, or by perturbation where none flow; modules that hide their products are run in int8."""
    some = of_samples(tensors.model, seen, _SAMPLES_AT_EIGHT_BITS) if eight_bits else seen
    rounds = max(1, _SAMPLES_AT_EIGHT_BITS // max(some.samples, 2)) if eight_bits else None
    found, is_enough = None, False
    if eight_bits and conf.approach == "weight_only":
        # Steps are those of 8 bits but where they do too much damage: most models are far from that.
        few = of_samples(tensors.model, seen, _FEW_SAMPLES)
        found = sensitivity.measure(tensors, few.calls, few.energies, conf.seed, rounds=1)
        is_enough = found is None or is_clear(tensors, found.tensors)
    if not is_enough:
        found = sensitivity.measure(tensors, some.calls, some.energies, conf.seed, rounds=rounds)
    if found is None:
        found = perturb(tensors, some.calls, conf.seed, some.logits)
    experts = mixtures(tensors)
    found = balanced(found, tensors, experts, routed(tensors, experts, some.calls))
    if conf.approach in ("auto", "dynamic"):
        found = replace(found, inputs={**found.inputs, **try_modules(tensors, seen)})
    return found
