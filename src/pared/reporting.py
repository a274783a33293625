"""What came of a search, for people: text of 100 columns and `deploy.yaml`. Formatting only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from pared.contents import Contents, Stored
from pared.errors import CorruptError
from pared.layers import Activation
from pared.ledger import WIDTH, Ledger, draw
from pared.profile import Running


@dataclass(frozen=True)
class Confirmation:
    """The result on data that the search has not seen.

    Args:
        score: of the quantized model.
        baseline: of the float model.
        loss: in the unit of the criterion's tolerable loss.
        standard_error: of the loss, paired over samples; None where the score was a single number.
    """

    score: float
    baseline: float
    loss: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Trial:
    """One model that was built and evaluated.

    Args:
        price: damage per byte at which its plan is optimal.
        damage: predicted: the expected share of the output's energy that is lost.
        nbytes: of its `best_model.pt`.
        score: what `eval_func` gave.
        loss: in the unit of the criterion's tolerable loss; negative for a gain.
        met: whether the criterion was met, on unseen data too where there are any.
        seconds: of building and evaluating.
        standard_error: of the loss, paired over samples; None where the score was a single number.
        unseen: the result on data that the search has not seen, where there are any.
    """

    price: float
    damage: float
    nbytes: int
    score: float
    loss: float
    met: bool
    seconds: float
    standard_error: float | None = None
    unseen: Confirmation | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: a field is missing, or there is one too many.

        >>> trial = Trial(1e-9, 1e-3, 500, 0.9, 0.1, True, 2.0, 0.01, Confirmation(0.9, 1.0, 0.1))
        >>> Trial.from_json(asdict(trial)) == trial
        True
        """
        unseen = data.get("unseen")
        return cls(**{**data, "unseen": Confirmation(**unseen) if unseen else None})


_NOT_KEPT = ("trials", "blame")


@dataclass(frozen=True)
class Outcome:
    """How the search went.

    Args:
        met: whether the criterion was met; None if nothing was evaluated.
        score: of the returned model.
        baseline: of the float model.
        gap: by how much the tolerable loss was exceeded; 0 if it was met.
        confirmation: on unseen data, where there were any.
        trials: every model that was evaluated, in order.
        blame: of a model that does not meet the criterion: the tensors or activations that cost most, each with its
            share of the damage.
    """

    met: bool | None = None
    score: float | None = None
    baseline: float | None = None
    gap: float | None = None
    confirmation: Confirmation | None = None
    trials: tuple[Trial, ...] = ()
    blame: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What an artifact keeps: no trials, whose seconds depend on a clock, and no blame, which may be long."""
        return {key: value for key, value in asdict(self).items() if value is not None and key not in _NOT_KEPT}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_json`.

        Raises:
            CorruptError: the data are not what `to_json` gives.
        """
        try:
            confirmation = data.get("confirmation")
            return cls(**{**data, "confirmation": Confirmation(**confirmation) if confirmation else None})
        except (TypeError, AttributeError) as error:
            raise CorruptError(
                f"the recorded outcome makes no sense ({error})", remedy="Fetch the file again; it is damaged."
            ) from error


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


def text(ledger: Ledger, contents: Contents, outcome: Outcome, running: Mapping[str, Running], note: str = "") -> str:
    """The report of a quantized model: totals, scores, a note, and a row per tensor."""
    found = {line.name: line for line in lines(contents, running)}
    rows = [
        replace(row, because=_both(found[row.name].because, row.because)) if row.name in found else row
        for row in ledger.rows
    ]
    kernels = {line.name: line.kernel for line in found.values() if line.kernel != "float"}
    damages = {line.name: line.damage for line in found.values() if line.damage is not None}
    return "\n".join(
        (*_summary(ledger, outcome), *([note] if note else []), *draw(rows, kernels or None, damages or None))
    )


def _both(reason: str, stored: str) -> str:
    """What the plan and the file say, each thing once."""
    return "; ".join(dict.fromkeys(filter(None, (*reason.split("; "), *stored.split("; ")))))


def _summary(ledger: Ledger, outcome: Outcome) -> list[str]:
    ratio = f", {ledger.nbytes / ledger.original_nbytes:.3f} of the source" if ledger.original_nbytes else ""
    found = [f"{ledger.file}: {ledger.nbytes:,} bytes{ratio}, {ledger.bits_per_weight:.2f} bits per weight"]
    if outcome.met is not None:
        verdict = "met" if outcome.met else f"NOT met, {outcome.gap:.4g} too much was lost"
        found.append(f"criterion {verdict}: score {outcome.score:.6g}, baseline {outcome.baseline or 0.0:.6g}")
    if outcome.confirmation is not None:
        seen = outcome.confirmation
        error = "" if seen.standard_error is None else f" +- {seen.standard_error:.2g}"
        found.append(
            f"on unseen data: score {seen.score:.6g}, baseline {seen.baseline or 0.0:.6g}, loss {seen.loss:.4g}{error}"
        )
    if outcome.blame:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in outcome.blame)
        found += textwrap.wrap(f"most of the damage: {shares}", WIDTH, subsequent_indent="  ")
    return found + _trials(outcome.trials)


def _trials(trials: Sequence[Trial]) -> list[str]:
    """A table of the trials, 100 columns wide at most."""
    if not trials:
        return []
    found = [
        "",
        f"{'trial':>5} {'damage':>10} {'bytes':>15} {'score':>12} {'loss':>11} {'+-':>8} {'unseen loss':>12} "
        f"{'met':>4} {'seconds':>9}",
    ]
    for number, trial in enumerate(trials, 1):
        error = "" if trial.standard_error is None else f"{trial.standard_error:.2g}"
        unseen = "" if trial.unseen is None else f"{trial.unseen.loss:.4g}"
        found.append(
            f"{number:>5} {trial.damage:>10.3g} {trial.nbytes:>15,} {trial.score:>12.6g} {trial.loss:>11.4g} "
            f"{error:>8} {unseen:>12} {'yes' if trial.met else 'no':>4} {trial.seconds:>9.1f}"
        )
    return found


def deploy_yaml(ledger: Ledger, contents: Contents, outcome: Outcome, running: Mapping[str, Running]) -> str:
    """`deploy.yaml`: the plan with bytes, rates and reasons, the scores, and where it all came from."""
    rows = {row.name: row for row in ledger.rows}
    data = {
        "note": "For people; pared.load does not read it.",
        "bytes": ledger.nbytes,
        "ratio": round(ledger.nbytes / ledger.original_nbytes, 5) if ledger.original_nbytes else None,
        "outcome": asdict(outcome),
        "provenance": dict(contents.provenance),
        "activations": {name: a.to_json() for name, a in sorted(contents.activations.items())},
        "plan": [
            asdict(line) | {"shape": list(line.shape), "bytes": rows[line.name].nbytes, "rate": rows[line.name].bits}
            for line in lines(contents, running)
        ],
    }
    text: str = yaml.safe_dump(data, sort_keys=False, width=WIDTH, allow_unicode=True)
    return text
