"""Reports as text of 100 columns, and `deploy.yaml`. Formatting only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import yaml

from pared.artifact.outcome import Outcome, Trial
from pared.inspection.ledger import Ledger, draw
from pared.model.contents import Contents
from pared.runtime.lines import lines
from pared.runtime.profile import Running
from pared.terminal import WIDTH


def report(
    ledger: Ledger, contents: Contents, outcome: Outcome, running: Mapping[str, Running], notes: Sequence[str] = ()
) -> str:
    """The report of a quantized model: totals, scores, notes, and a row per tensor."""
    found = {line.name: line for line in lines(contents, running)}
    rows = [
        replace(row, because=_both(found[row.name].because, row.because)) if row.name in found else row
        for row in ledger.rows
    ]
    kernels = {line.name: line.kernel for line in found.values() if line.kernel != "float"}
    damages = {line.name: line.damage for line in found.values() if line.damage is not None}
    return "\n".join((*_summary(ledger, outcome), *_wrapped(notes), *draw(rows, kernels or None, damages or None)))


def _wrapped(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="    ")]


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
