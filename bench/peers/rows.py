"""What is known of one peer with one model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timing:
    """Milliseconds by round, and those of FP32 in the same process, round by round."""

    ms: list[list[float]] = field(default_factory=list)
    fp32_ms: list[list[float]] = field(default_factory=list)

    def add(self, answer: Mapping[str, Any]) -> None:
        self.ms.append(answer["ms"])
        self.fp32_ms.append(answer["fp32_ms"])

    @property
    def median(self) -> float:
        return statistics.median(x for block in self.ms for x in block)

    @property
    def span(self) -> tuple[float, float]:
        every = [x for block in self.ms for x in block]
        return min(every), max(every)

    @property
    def ratios(self) -> list[float]:
        """To FP32 in the same process, by round: the medians'."""
        blocks = zip(self.ms, self.fp32_ms, strict=True)
        return [statistics.median(ours) / statistics.median(theirs) for ours, theirs in blocks]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass
class Row:
    """Sizes in bytes, times in seconds but for timings; None where it did not come so far.

    Args:
        settings, needs: how the tool was asked, and what it takes to reload beside its files.
        form: in which of its forms ours answers.
        reloaded: how far a reloaded model's outputs are off, as a share of the output's peak.
        errors: met on the way, each with where.
    """

    subject: str
    peer: str
    versions: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    seconds: float | None = None
    peak: int | None = None
    peak_before: int | None = None
    score: float | None = None
    fidelity: float | None = None
    reloaded: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    form: str = ""
    settings: str = ""
    needs: str = ""
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, answer: Mapping[str, Any]) -> bool:
        """Keep what was answered; whether it was no error."""
        self.notes = list(dict.fromkeys([*self.notes, *answer.get("notes", ())]))
        self.settings, self.needs = answer.get("settings", self.settings), answer.get("needs", self.needs)
        if "error" in answer:
            self.errors.append(f"{answer['at']}: {answer['error']}")
            return False
        for name in ("versions", "bytes", "seconds", "peak", "peak_before", "score", "fidelity", "form"):
            if name in answer:
                setattr(self, name, answer[name])
        if "off" in answer:
            self.reloaded = answer["off"]
        return True


def read(record: Mapping[str, Any]) -> Row:
    """The inverse of `asdict`."""
    return Row(**{**record, "timings": {shape: Timing(**each) for shape, each in record["timings"].items()}})
