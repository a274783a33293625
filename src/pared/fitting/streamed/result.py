"""What came of fitting a folder, and its report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pared.artifact.envelope import open_records
from pared.artifact.index import Entry
from pared.artifact.outcome import Curve, Damage, Outcome
from pared.artifact.parse import parse_index
from pared.fitting.search import trade_off
from pared.fitting.streamed.deciding.compressor import Built, FolderCompressor
from pared.formats import coded as formats
from pared.formats.coded import RAW_TYPES, Coded
from pared.formats.views import View
from pared.inspection import ledger
from pared.inspection.ledger import Ledger
from pared.inspection.page import page
from pared.inspection.page.drawing import require_library
from pared.model.contents import Contents, Decision, Kind, Stored
from pared.runtime import summary
from pared.runtime.profile.profile import Profile, this_machine


@dataclass(frozen=True, eq=False)
class Fitted:
    """An artifact, and how it was found.

    Args:
        listing: what is in the artifact.
        contents: the same without numbers, with the reasons of decisions.
        files: those with weights that were asked for: the artifact, or the files of another runtime.
        outcome: how the search went, and the damage that is predicted.
        curve: bytes against damage, with the scores of the trials.
    """

    listing: Ledger
    contents: Contents
    files: tuple[Path, ...]
    outcome: Outcome
    curve: Curve

    @property
    def path(self) -> Path:
        """The file that was asked for, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    @property
    def nbytes(self) -> int:
        """The size of the files that were asked for."""
        return sum(file.stat().st_size for file in self.files)

    def report(self, html: Path | None = None) -> str:
        """What `pared.report` says of a model in memory.

        Args:
            html: also write the report, with pictures, to this file.

        Raises:
            ConfigError: `html` is given, and the drawing libraries are not installed: `pip install 'pared[report]'`.
            FileError: the page cannot be written.
        """
        if html is not None:
            require_library()
            data = summary.page_data(self.listing, self.contents, self.outcome, {}, Profile(this_machine()), self.curve)
            page.write(data, html)
        notes = [*summary.made_for(self.contents), "weights alone were rounded; nothing was timed"]
        return summary.report(self.listing, self.contents, self.outcome, {}, notes)

    def deploy_yaml(self) -> str:
        """What stands in `deploy.yaml` beside the artifact."""
        return summary.deploy_yaml(self.listing, self.contents, self.outcome, {}, Profile(this_machine()))


def fitted(artifact: Path, files: tuple[Path, ...], compressor: FolderCompressor, built: Built, name: str) -> Fitted:
    """What is known of an artifact.

    Args:
        artifact: where it was written.
        files: what was asked for.
        compressor: made it.
        built: what it was made of.
        name: the class of its model.
    """
    decisions = compressor.decisions(built)
    lost = sum(decision.damage or 0.0 for decision in decisions.values())
    curve = trade_off.trace(compressor)
    outcome = replace(built.outcome, damage=Damage(predicted=lost))
    with open_records(artifact) as records:
        index = parse_index(records)
        listing = ledger.of_records(replace(records, where=name), index)
    tensors = tuple(_outlined(entry, decisions[entry.name]) for entry in index.entries)
    contents = Contents(tensors, {}, index.provenance)
    return Fitted(listing, contents, files, outcome, curve.scored(outcome) if outcome.trials else curve)


def _outlined(entry: Entry, decision: Decision) -> Stored:
    """A tensor of an artifact without its numbers."""
    kind: Kind = "parameter" if entry.kind == "parameter" else "buffer"
    view = View(*entry.view) if entry.view is not None else None
    format = formats.from_json(entry.format, entry.dtype)
    return Stored(entry.names, kind, Coded(format, entry.shape, RAW_TYPES[entry.dtype], {}, view), decision)
