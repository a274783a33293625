"""What an artifact holds, as values in memory: the hand-over between fit, files and live models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from pared.errors import MismatchError
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Raw, dtype_name
from pared.model.tensors import find_tensors
from pared.readers.naming import aligned

Treatment = Literal["grid", "float16", "float32", "exact"]


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor.

    Args:
        name: the tensor's first name.
        treatment: "grid" at `bits` per weight; "float16" or "float32"; or "exact".
        bits: the rate asked for, or planned by the search; only for grids. None while the search has yet to decide.
        because: the reason, for people.
        damage: predicted, as a share of the output's energy; only with calibration data.
    """

    name: str
    treatment: Treatment
    bits: float | None
    because: str
    damage: float | None = field(default=None, compare=False)  # a prediction, which no artifact keeps

    def to_json(self) -> dict[str, Any]:
        """The decision as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}


Plan = tuple[Decision, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a model, in its format.

    Args:
        names: every dotted name it goes by; the first is its name in tables.
        kind: whether it is a parameter or a buffer.
        coded: its numbers.
        decision: what was decided about it, and why.
    """

    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]
    coded: Coded
    decision: Decision

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that an artifact holds.

    Args:
        tensors: every parameter and buffer of the model, once.
        activations: how each int8 counterpart treats its input, by module name; modules that are not named run in
            float.
        provenance: versions, configuration, scores: plain data, for people.
    """

    tensors: tuple[Stored, ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def match(model: nn.Module, contents: Contents) -> list[tuple[Stored, list[Tensor]]]:
    """Pair what is stored with the model's own tensors, strictly.

    Returns:
        (stored, the model's tensors of its names) for everything stored; several objects where the source tied them
        and this model does not.

    Raises:
        MismatchError: a tensor is missing on either side, has another shape, or is tied in the model but not in the
            contents.
    """
    slots = find_tensors(model)
    by_name = {name: stored for stored in contents.tensors for name in stored.names}
    wanted = {name for slot in slots for name in slot.names}
    _refuse_difference(wanted, set(by_name))
    found: dict[int, tuple[Stored, list[Tensor]]] = {}
    for slot in slots:
        stored = by_name[slot.name]
        if any(by_name[name] is not stored for name in slot.names):
            raise MismatchError(
                f"the model ties {' and '.join(slot.names)}, the artifact holds them apart",
                where=slot.name,
                remedy="Build the model with the configuration that the artifact was made from.",
            )
        if tuple(slot.tensor.shape) != stored.coded.shape:
            raise MismatchError(
                f"the model has shape {list(slot.tensor.shape)}, the artifact {list(stored.coded.shape)}",
                where=slot.name,
                remedy="Build the model with the configuration that the artifact was made from.",
            )
        objects = found.setdefault(id(stored), (stored, []))[1]
        objects.extend(slot.objects)
    return list(found.values())


def completed(model: nn.Module, contents: Contents) -> Contents:
    """Contents with what a checkpoint leaves to the model.

    That is which tensors are buffers, further names of those that are tied, and buffers in no state dict. What was made
    from a model holds all of this already. Names that differ from the model's by what wrappers put into them, or by one
    prefix before all, become the model's.

    Args:
        model: of the right architecture; on the CPU, or on the meta device if it has no such buffers.
        contents: of an artifact.
    """
    slots = find_tensors(model)
    contents = _renamed(contents, [name for slot in slots for name in slot.names])
    held = {name: i for i, stored in enumerate(contents.tensors) for name in stored.names}
    tensors = list(contents.tensors)
    for slot in slots:
        missing = tuple(name for name in slot.names if name not in held)
        places = {held[name] for name in slot.names if name in held}
        if len(places) == 1:
            (place,) = places
            tensors[place] = replace(tensors[place], names=(*tensors[place].names, *missing), kind=slot.kind)
        elif not places and not slot.persistent and not slot.tensor.is_meta:
            coded = Raw(dtype_name(slot.tensor.dtype)).encode(slot.tensor)
            because = "a buffer that the state dict leaves out"
            tensors.append(Stored(slot.names, slot.kind, coded, Decision(slot.name, "exact", None, because)))
    return replace(contents, tensors=tuple(tensors))


def _renamed(contents: Contents, wanted: Sequence[str]) -> Contents:
    """The same under the names of a model, where it is clear which is which."""
    known = aligned([name for stored in contents.tensors for name in stored.names], wanted)
    if not known:
        return contents
    modules = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in known.items()}
    tensors = tuple(
        replace(stored, names=names, decision=replace(stored.decision, name=names[0]))
        for stored in contents.tensors
        for names in [tuple(known[name] for name in stored.names)]
    )
    activations = {modules.get(name, name): value for name, value in contents.activations.items()}
    return replace(contents, tensors=tensors, activations=activations)


def _refuse_difference(wanted: set[str], held: set[str]) -> None:
    if wanted == held:
        return
    missing, extra = sorted(wanted - held), sorted(held - wanted)
    parts = []
    if missing:
        parts.append(f"the artifact lacks {_some(missing)}")
    if extra:
        parts.append(f"the model has no {_some(extra)}")
    raise MismatchError(
        "; ".join(parts),
        where="wrong architecture",
        remedy="Build the model with the configuration that the artifact was made from.",
    )


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
