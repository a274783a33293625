"""What an artifact holds, as values in memory: what fit makes, files store and live models are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pared.errors import MismatchError
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Raw, dtype_name
from pared.formats.groups.grid import Numbers
from pared.formats.views import first_dimension
from pared.model.state.extra import KEY, ExtraState
from pared.model.state.tables import Made, check_made, left_to_constructor
from pared.model.tensors import ModelTensors
from pared.readers.naming import N_AVERAGED, aligned

Treatment = Literal["grid", "float16", "bfloat16", "float32", "exact", "made"]


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor.

    Args:
        name: the tensor's first name.
        treatment: "grid" at `bits` per weight; a floating type; "exact", bit for bit; or "made": a buffer that
            no file holds, since the constructor of its class makes it.
        bits: bits per weight, as a rule or the search decided; only for grids. None until the search has decided.
        because: the reason, as reports show it; empty where it is the usual format.
        damage: the predicted share of the output's energy that is lost; None without calibration data.
        own_grid: the grid is the one that all of its numbers lie on already, so nothing is lost. In an artifact it is
            a grid like any other.
    """

    name: str
    treatment: Treatment
    bits: float | None
    because: str
    damage: float | None = field(default=None, compare=False)  # a prediction, which no artifact keeps
    own_grid: bool = field(default=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The decision as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "own_grid"}


Plan = tuple[Decision, ...]
Kind = Literal["parameter", "buffer", "state"]


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a model, in its format.

    Args:
        names: every dotted name it goes by; the first is its name in tables.
        kind: whether it is a parameter or a buffer; or part of a module's extra state, in files only.
        coded: its numbers in this format.
        decision: which format, and why.
    """

    names: tuple[str, ...]
    kind: Kind
    coded: Coded
    decision: Decision

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    def matrix_parts(self) -> dict[str, Numbers]:
        """The parts of a weight with groups as arrays, the codes as its matrix: (rows, columns)."""
        view = self.coded.view or first_dimension(self.coded.shape)
        parts = {name: part.detach() for name, part in self.coded.parts.items()}
        return {name: (view.matrix(part) if name == "codes" else part).numpy() for name, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that an artifact holds.

    Args:
        tensors: every parameter and buffer of the model, once.
        activations: by module name, how the input of each module that can run in int8 is rounded; all other modules run
            in float.
        provenance: versions, configuration and scores, as JSON data that nothing depends on.
        states: the extra state of modules, by their names in a state dict.
        made: what a file tells of the buffers that it leaves to constructors, until they are met in a model.
    """

    tensors: tuple[Stored, ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, ExtraState] = field(default_factory=dict)
    made: tuple[Made, ...] = ()


def same(ours: Contents, theirs: Contents) -> bool:
    """Whether two contents give the same numbers, for inputs too: the same codes and steps under the same names."""
    if len(ours.tensors) != len(theirs.tensors) or ours.activations != theirs.activations:
        return False

    def equal(a: Stored, b: Stored) -> bool:
        first, second = a.coded, b.coded
        return (
            (a.names, first.format, first.shape, first.dtype, first.view)
            == (b.names, second.format, second.shape, second.dtype, second.view)
            and first.parts.keys() == second.parts.keys()
            and all(torch.equal(part, second.parts[name]) for name, part in first.parts.items())
        )

    return all(map(equal, ours.tensors, theirs.tensors))


def match(model: ModelTensors[nn.Module], contents: Contents) -> list[tuple[Stored, list[Tensor]]]:
    """Pair each stored tensor with the tensors of the model that have its names.

    Args:
        model: the tensors of a model of the same architecture.
        contents: the contents of an artifact, as `completed` returns them.

    Returns:
        for everything stored, the model's tensors: several objects where they are tied in the source but not here.

    Raises:
        MismatchError: a tensor is missing on either side, has another shape, or is tied in the model but not in the
            contents.
    """
    by_name = {name: stored for stored in contents.tensors for name in stored.names}
    wanted = {name for tensor in model for name in tensor.names}
    _refuse_difference(wanted, set(by_name))
    found: dict[int, tuple[Stored, list[Tensor]]] = {}
    for tensor in model:
        stored = by_name[tensor.name]
        if any(by_name[name] is not stored for name in tensor.names):
            raise MismatchError(
                f"the model ties {' and '.join(tensor.names)}, the artifact holds them apart",
                where=tensor.name,
                remedy="Build the model with the configuration that the artifact was made from.",
            )
        if tuple(tensor.tensor.shape) != stored.coded.shape and tensor.persistent:  # others may grow when they are used
            raise MismatchError(
                f"the model has shape {list(tensor.tensor.shape)}, the artifact {list(stored.coded.shape)}",
                where=tensor.name,
                remedy="Build the model with the configuration that the artifact was made from.",
            )
        objects = found.setdefault(id(stored), (stored, []))[1]
        objects.extend(tensor.objects)
    return list(found.values())


def completed(model: ModelTensors[nn.Module], contents: Contents) -> Contents:
    """The contents with everything that only the model knows, where they were made from a checkpoint.

    That is which tensors are buffers, the other names of tied tensors, and buffers that are in no state dict. Contents
    made by `fit` have all of this. Names that differ from the model's by the prefix of a wrapper become the model's.

    Args:
        model: the tensors of a model of the same architecture; on the CPU, or on the meta device if all of its buffers
            are in the state dict.
        contents: everything that an artifact holds.
    """
    wanted = [name for tensor in model for name in tensor.names]
    if N_AVERAGED not in wanted:  # a checkpoint of an AveragedModel, loaded into the model itself
        contents = replace(contents, tensors=tuple(one for one in contents.tensors if one.names != (N_AVERAGED,)))
    contents = _renamed(_with_states(contents), wanted)
    computed, told = left_to_constructor(model), {name: one for one in contents.made for name in one.names}
    held = {name: i for i, stored in enumerate(contents.tensors) for name in stored.names}
    tensors = list(contents.tensors)
    for tensor in model:
        missing = tuple(name for name in tensor.names if name not in held)
        places = {held[name] for name in tensor.names if name in held}
        if len(places) == 1:
            (place,) = places
            tensors[place] = replace(tensors[place], names=(*tensors[place].names, *missing), kind=tensor.kind)
        elif not places and not tensor.persistent:
            if tensor.name in told:
                check_made(told[tensor.name], tensor.tensor)
            if not tensor.tensor.is_meta:
                coded = Raw(dtype_name(tensor.tensor.dtype)).encode(tensor.tensor)
                computes = tensor.name in told or tensor.name in computed
                tensors.append(Stored(tensor.names, tensor.kind, coded, unregistered(tensor.name, computes)))
    return replace(contents, tensors=tuple(tensors), made=())


def _with_states(contents: Contents) -> Contents:
    """The contents of a checkpoint, in which extra state that is a tensor looks like any other tensor."""
    states = {one.name: one for one in contents.tensors if one.name.rpartition(".")[2] == KEY}
    if not states:
        return contents
    tensors = tuple(one for one in contents.tensors if one.name not in states)
    more = {name: ExtraState({"tensor": 0}, (one.coded.decode(),)) for one in states.values() for name in one.names}
    return replace(contents, tensors=tensors, states={**contents.states, **more})


def in_type(contents: Contents, model: ModelTensors[nn.Module], dtype: torch.dtype) -> Contents:
    """The contents with floats of another type; buffers that are in no state dict keep theirs, as in transformers."""
    kept = {name for tensor in model if not tensor.persistent for name in tensor.names}
    tensors = tuple(
        replace(one, coded=replace(one.coded, dtype=dtype))
        if one.coded.dtype.is_floating_point and one.name not in kept
        else one
        for one in contents.tensors
    )
    return replace(contents, tensors=tensors)


def unregistered(name: str, computed: bool) -> Decision:
    """What becomes of a buffer that is in no state dict: exact, or left to the constructor where that computes it."""
    if computed:
        return Decision(name, "made", None, "a table that the constructor computes: the file leaves it out")
    return Decision(name, "exact", None, "a buffer that the state dict leaves out")


def _renamed(contents: Contents, wanted: Sequence[str]) -> Contents:
    """The same contents under the names of the model, where it is clear which is which."""
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
