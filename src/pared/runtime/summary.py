"""What became of a model, as text: a line for each tensor, the trials, the totals."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import yaml

from pared.artifact.outcome import Curve, Outcome, Trial
from pared.formats.activation import Activation
from pared.inspection.ledger import Ledger, Row, draw
from pared.inspection.page.data import PageData
from pared.model.contents import Contents, Stored
from pared.runtime.profile.profile import Profile, Running
from pared.targets.table import TARGETS
from pared.terminal import WIDTH, table


@dataclass(frozen=True)
class TensorSummary:
    """What one tensor became.

    Args:
        name: the tensor's first name.
        shape: its shape.
        treatment: "grid", "float16", "float32" or "exact"; "made" for what the constructor makes, and no file holds.
        bits: the planned bits per weight if it is on a grid, else None.
        format: the label of its format, "grid int8" for instance.
        kernel: how it is computed with: "int8 static", "int8 dynamic", "int8 gather", "bfloat16" or "float".
        because: the reason for the treatment and the kernel.
        damage: the predicted loss as a share of the output's energy; None without calibration data and after loading.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    bits: float | None
    format: str
    kernel: str
    because: str
    damage: float | None = field(default=None, compare=False)


def tensor_summaries(contents: Contents, running: Mapping[str, Running]) -> tuple[TensorSummary, ...]:
    """One line per tensor, in the model's order."""
    return tuple(_line(stored, contents.activations, running) for stored in contents.tensors)


def made_for(contents: Contents) -> list[str]:
    """A note on the runtime whose formats the tensors have, and how many of them each."""
    target = TARGETS.get(str(contents.provenance.get("target")))
    if target is None:
        return []
    because = [stored.decision.because.partition(";")[0] for stored in contents.tensors]
    counts = [(offer.name, because.count(offer.name)) for offer in target.offers]
    formats = ", ".join(f"{count:,} in {name}" for name, count in counts if count)
    return [f"tensors in the formats of {target.title}: {formats or 'none'}; bytes are those of pared's own file"]


def left_out(contents: Contents) -> list[str]:
    """A note on the buffers that files leave to the constructor of their class."""
    made = [stored.name for stored in contents.tensors if stored.decision.treatment == "made"]
    if not made:
        return []
    more = f" and {len(made) - 1:,} more" if made[1:] else ""
    return [f"not in the file, since the constructor computes them: {made[0]}{more}"]


_KERNEL_LABELS = {"int8": "int8 {}", "bfloat16": "bfloat16", "float32": "float"}


def _line(stored: Stored, activations: Mapping[str, Activation], running: Mapping[str, Running]) -> TensorSummary:
    module, _, attribute = stored.name.rpartition(".")
    kernel, because = "float", stored.decision.because
    if module in activations and attribute in activations[module].weights and module in running:
        here = running[module]
        kernel = _KERNEL_LABELS[here.kernel].format(activations[module].mode)
        because = "; ".join(filter(None, (because, here.because)))
    decision, coded = stored.decision, stored.coded
    return TensorSummary(
        stored.name,
        coded.shape,
        decision.treatment,
        decision.bits,
        coded.format.label,
        kernel,
        because,
        decision.damage,
    )


def page_data(
    ledger: Ledger,
    contents: Contents,
    outcome: Outcome,
    running: Mapping[str, Running],
    profile: Profile,
    curve: Curve | None,
) -> PageData:
    """The data of a quantized model's page."""
    found = tensor_summaries(contents, running)
    times = {
        name: {"float32": timing.float32_ms, "bfloat16": timing.bfloat16_ms, "int8": timing.int8_ms}
        for name, timing in profile.layers.items()
        if name in running
    }
    return PageData(
        _explained(ledger, found),
        fitted=True,
        outcome=outcome,
        curve=curve,
        kernels={line.name: line.kernel for line in found},
        damages=_damages(found),
        activations={name: activation.to_json() for name, activation in contents.activations.items()},
        times=times,
        running={name: running[name].kernel for name in times},
        provenance={key: value for key, value in contents.provenance.items() if key != "outcome"},
    )


def report(
    ledger: Ledger, contents: Contents, outcome: Outcome, running: Mapping[str, Running], notes: Sequence[str] = ()
) -> str:
    """The report of a quantized model: totals, scores, notes, and a row per tensor."""
    found = tensor_summaries(contents, running)
    kernels = {line.name: line.kernel for line in found if line.kernel != "float"}
    body = draw(_explained(ledger, found).rows, kernels or None, _damages(found) or None)
    return "\n".join((*_summary(ledger, outcome), *_wrapped(notes), *body))


def _explained(ledger: Ledger, found: Sequence[TensorSummary]) -> Ledger:
    """The ledger with the reasons for each tensor's format and kernel."""
    reasons = {line.name: line.because for line in found}
    rows = (replace(row, because=_both(reasons.get(row.name, ""), row.because)) for row in ledger.rows)
    return replace(ledger, rows=tuple(rows))


def _damages(found: Sequence[TensorSummary]) -> dict[str, float]:
    return {line.name: line.damage for line in found if line.damage is not None}


def _wrapped(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="    ")]


def _both(reason: str, stored: str) -> str:
    """The reasons of the plan and of the file, without repetitions."""
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
    for line in outcome.damage.lines() if outcome.damage is not None else ():
        found += textwrap.wrap(line, WIDTH, subsequent_indent="  ")
    if outcome.contributors:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in outcome.contributors)
        found += textwrap.wrap(f"most of the damage: {shares}", WIDTH, subsequent_indent="  ")
    return found + _trials(outcome.trials)


def _trials(trials: Sequence[Trial]) -> list[str]:
    if not trials:
        return []
    headings = ["trial", "damage", "bytes", "score", "loss", "+-", "unseen loss", "met", "seconds"]
    rows = [
        [
            str(number),
            f"{trial.damage:.3g}",
            f"{trial.nbytes:,}",
            f"{trial.score:.6g}",
            f"{trial.loss:.4g}",
            "" if trial.standard_error is None else f"{trial.standard_error:.2g}",
            "" if trial.unseen is None else f"{trial.unseen.loss:.4g}",
            "yes" if trial.met else "no",
            f"{trial.seconds:.1f}",
        ]
        for number, trial in enumerate(trials, 1)
    ]
    return table(headings, rows)[:-1]


def deploy_yaml(
    ledger: Ledger, contents: Contents, outcome: Outcome, running: Mapping[str, Running], profile: Profile
) -> str:
    """`deploy.yaml`: the plan with bytes, rates and reasons, the scores, how it runs, and where it all came from."""
    rows = {row.name: row for row in ledger.rows}
    data = {
        "note": "For people; pared.load does not read it.",
        "bytes": ledger.nbytes,
        "ratio": round(ledger.nbytes / ledger.original_nbytes, 5) if ledger.original_nbytes else None,
        "outcome": asdict(outcome),
        "runs": [line.strip() for line in profile.summary()],
        "provenance": dict(contents.provenance),
        "activations": {name: a.to_json() for name, a in sorted(contents.activations.items())},
    }
    # The dumper in C gives the same text in a tenth of the time; not every PyYAML has it.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(data, Dumper=dumper, sort_keys=False, width=WIDTH, allow_unicode=True)
    # A line for each tensor, of which there may be very many: that is shorter, and written much faster.
    lines = [_plan_line(line, rows.get(line.name)) for line in tensor_summaries(contents, running)]
    return text + "\n".join(("plan:" if lines else "plan: []", *lines, ""))


def _plan_line(line: TensorSummary, row: Row | None) -> str:
    """An item of a list in YAML, without what says nothing. No row: the file leaves the tensor out."""
    known = {**vars(line), "bytes": row.nbytes if row else 0, "rate": row.bits if row else 0.0}
    pairs = (f"{key}: {_inline(value)}" for key, value in known.items() if value is not None and value != "")
    return f"- {{{', '.join(pairs)}}}"


_NOT_FINITE: Final = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}


def _inline(value: object) -> str:
    """A value as YAML within a line.

    >>> _inline((2, 3)), _inline(1e-05), _inline("a: b")
    ('[2, 3]', '1.0e-05', '"a: b"')
    """
    if isinstance(value, tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, float):
        text = float.__repr__(value)
        return _NOT_FINITE.get(text) or (text if "." in text else text.replace("e", ".0e"))
    if isinstance(value, str) and not (value.isascii() and value.isprintable()):
        quoted: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
        return quoted.rstrip("\n")
    return json.dumps(value)
