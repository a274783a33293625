"""What each tensor of a quantized model became: one line per tensor, for every kind of report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pared.artifact.outcome import Curve, Outcome
from pared.formats.activation import Activation
from pared.inspection.ledger import Ledger
from pared.inspection.page.facts import Detail, Facts, Times
from pared.model.contents import Contents, Stored
from pared.runtime.profile import Profile, Running


@dataclass(frozen=True)
class Line:
    """What one tensor became.

    Args:
        name: its first name.
        shape: of the tensor.
        treatment: "grid", "float16", "float32" or "exact".
        bits: the rate asked for, on a grid.
        format: its label, "grid int8" for instance.
        kernel: what runs: "int8 static", "int8 dynamic", "int8 gather", "bfloat16", or "float".
        because: the reason.
        damage: predicted, as a share of the output's energy; only with calibration data, and not after loading.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    bits: float | None
    format: str
    kernel: str
    because: str
    damage: float | None = field(default=None, compare=False)


def lines(contents: Contents, running: Mapping[str, Running]) -> tuple[Line, ...]:
    """One line per tensor, in the model's order."""
    return tuple(_line(stored, contents.activations, running) for stored in contents.tensors)


_KERNEL_LABELS = {"int8": "int8 {}", "bfloat16": "bfloat16", "float32": "float"}


def _line(stored: Stored, activations: Mapping[str, Activation], running: Mapping[str, Running]) -> Line:
    module, _, attribute = stored.name.rpartition(".")
    kernel, because = "float", stored.decision.because
    if module in activations and attribute in activations[module].weights and module in running:
        here = running[module]
        kernel = _KERNEL_LABELS[here.kernel].format(activations[module].mode)
        because = "; ".join(filter(None, (because, here.because)))
    decision, coded = stored.decision, stored.coded
    return Line(
        stored.name,
        coded.shape,
        decision.treatment,
        decision.bits,
        coded.format.label,
        kernel,
        because,
        decision.damage,
    )


def facts(
    ledger: Ledger,
    contents: Contents,
    outcome: Outcome,
    running: Mapping[str, Running],
    profile: Profile,
    curve: Curve | None,
) -> Facts:
    """What a page shows of a quantized model."""
    return Facts(
        ledger,
        fitted=True,
        outcome=outcome,
        curve=curve,
        details={one.name: Detail(one.kernel, one.because, one.damage) for one in lines(contents, running)},
        activations={name: activation.to_json() for name, activation in contents.activations.items()},
        times={
            name: Times(
                running[name].kernel,
                {"float32": timing.float32_ms, "bfloat16": timing.bfloat16_ms, "int8": timing.int8_ms},
            )
            for name, timing in profile.layers.items()
            if name in running
        },
        provenance={key: value for key, value in contents.provenance.items() if key != "outcome"},
    )
