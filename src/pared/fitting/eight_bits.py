"""The model at 8 bits everywhere: what `fit` makes where it is asked for neither a size nor an accuracy."""

from __future__ import annotations

from typing import Final

from pared.fitting.measured.repair import Corrections
from pared.fitting.preparation import Prepared
from pared.fitting.rounding import encoding, plan, precision
from pared.fitting.search.activations import choose_activations, find_candidates
from pared.fitting.search.compressor import provenance
from pared.model.contents import Contents, Stored
from pared.model.state import extra
from pared.model.tensors import ModuleT
from pared.runtime import quantized
from pared.runtime.profile.profile import Profile, this_machine

# The damage that rounding the inputs of layers may do at 8 bits, the price of int8 kernels: a tenth of a percent, as
# for the search, would leave layers in float and most inputs to the slower dynamic mode.
_INPUT_DAMAGE: Final = 4e-3
# And the most that an output may lose with int8 inputs, measured, where it would lose far less without: 26 dB.
MOST_LOST_WITH_INPUTS: Final = 2.5e-3


def at_eight_bits(known: Prepared[ModuleT], corrections: Corrections = Corrections()) -> ModuleT:  # noqa: B008  # frozen
    """The quantized model at 8 bits, with more bits where calibration says that 8 would do too much damage.

    Args:
        known: what `fit` knows.
        corrections: what was measured of an earlier model.
    """
    conf, seen, sensitivity = known.conf, known.seen, known.sensitivity
    decisions = plan.make_plan(known.tensors, conf.rules, strict=conf.strict)
    if sensitivity is not None:
        corrected = sensitivity.corrected(known.tensors, corrections.factors).tensors
        decisions = precision.with_enough_bits(decisions, known.tensors, corrected, strict=conf.strict)
    stored = tuple(
        Stored(tensor.names, tensor.kind, encoding.encode(tensor, decision), decision)
        for tensor, decision in zip(known.tensors, decisions, strict=True)
    )
    candidates = find_candidates(known.tensors.model, stored, seen.inputs if seen else None)
    approach = "weight_only" if seen is None and conf.approach == "auto" else conf.approach
    budget = _INPUT_DAMAGE * corrections.inputs if approach == "auto" else float("inf")
    activations = choose_activations(candidates, approach, sensitivity.inputs if sensitivity else {}, budget)
    contents = Contents(
        stored, activations, provenance(conf, seen.samples if seen else 0), extra.collect(known.tensors.model)
    )
    return quantized.assemble(known.tensors, contents, Profile(this_machine()))
