"""A compressor whose models are nothing but their damage and some bytes: the laws of the search are tested on it."""

from __future__ import annotations

import base64
import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pared.allocate import Choice
from pared.fitting.search.compressor import Compressor
from pared.fitting.search.maker import OperatingPoint
from pared.formats.coded import Raw
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import find_tensors
from pared.runtime import quantized
from pared.runtime.profile.profile import Profile, this_machine

# What an artifact of one tensor takes beside its numbers, and a little more.
OVERHEAD = 2500
WEIGHTS = 40_000


class Probe(nn.Module):
    """A model of known damage; the float one has none."""

    def __init__(self, damage: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("damage", torch.tensor(damage, dtype=torch.float64))


def damage_of(model: nn.Module) -> float:
    return float(model.get_buffer("damage"))


@dataclass
class Synthetic(Compressor[Probe]):
    """Half a bit per weight and factor 2 of damage, as rate-distortion theory has it."""

    least: float = 1e-9
    most: float = 0.3
    built: list[OperatingPoint] = field(default_factory=list)

    def nbytes(self, damage: float) -> int:
        return OVERHEAD + int(WEIGHTS * 0.5 * math.log2(1 / damage) / 8)

    def at_damage(self, damage: float) -> OperatingPoint:
        assert self.least <= damage <= self.most
        nbytes = self.nbytes(damage)
        return OperatingPoint(Choice(damage * 16 * math.log(2) / WEIGHTS, (), nbytes, damage), damage, nbytes)

    def within_bytes(self, nbytes: int, reserve: int = 0) -> OperatingPoint:
        damage = 2.0 ** (-(nbytes - OVERHEAD) * 16 / WEIGHTS)
        return self.at_damage(min(max(damage, self.least), self.most))

    def nbytes_of(self, point: OperatingPoint, made: Probe) -> int:  # all that it has made
        return quantized.nbytes(made)

    def original(self) -> AbstractContextManager[Probe]:
        return nullcontext(Probe())

    def read(self, file: Path) -> Probe:
        return quantized.assemble(find_tensors(Probe()), storage.read(file), Profile(this_machine()))

    def build(self, point: OperatingPoint) -> Probe:
        self.built.append(point)
        source = Probe(point.damage)
        coded = Raw("float64").encode(source.get_buffer("damage"))
        stored = Stored(("damage",), "buffer", coded, Decision("damage", "exact", None, ""))
        # The bytes that weights would take are letters in the index: so all models have the same structure.
        letters = base64.b64encode(random.Random(0).randbytes(point.nbytes)).decode()
        provenance = {"weights": letters[: point.nbytes - OVERHEAD]}
        return quantized.assemble(find_tensors(source), Contents((stored,), {}, provenance), Profile(this_machine()))

    def contributors(self, point: OperatingPoint) -> list[tuple[str, float]]:
        return [("encoder.weight", 0.75), ("decoder.weight", 0.25)]
