"""How an exported model is called: which argument is which input of the graph, and how its outputs are structured."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from pared.errors import ConfigError
from pared.files.checks import Place
from pared.formats.coded import RAW_TYPES, dtype_name

SIGNATURE: Final = "pared.signature"  # the key of the file's metadata


# What a file may ask for: numbers in a sample, containers within containers, characters of a value that is parsed; and
# what stands for an infinite end of a range.
_MOST_SAMPLED: Final = 1 << 26
_FAR: Final = 1e4
_LONGEST_VALUE: Final = 10_000
_DEEPEST: Final = 50


class Outputs(dict[str, Any]):
    """Outputs with names: by key, as attributes, or by place, like the output classes of `transformers`.

    >>> out = Outputs(logits=1, state=2)
    >>> out["logits"], out.logits, out[1]
    (1, 1, 2)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        """By name, or by place among those that are not None."""
        if isinstance(key, (int, slice)):
            return tuple(value for value in self.values() if value is not None)[key]
        return super().__getitem__(key)


@dataclass(frozen=True)
class ExportedArgument:
    """One argument of the model's `forward`.

    Args:
        name: as `forward` calls it.
        inputs: the names of the graph's inputs for its tensors, in order; empty if it has none.
        value: the `repr` of an argument without tensors at the export: the graph is valid only for this value.
    """

    name: str
    inputs: tuple[str, ...]
    value: str = ""


@dataclass(frozen=True)
class GraphInput:
    """One tensor that the graph takes.

    Args:
        dtype: the element type, "int64" for instance.
        shape: a number for each dimension that is fixed, and a name for each that may vary.
        example: the shape at the export.
        low, high: the least and the greatest value at the export.
    """

    dtype: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...]
    low: float
    high: float

    @classmethod
    def of(cls, tensor: Tensor, shape: tuple[int | str, ...]) -> GraphInput:
        """The input for which a tensor of the example stands."""
        low, high = (float(end) for end in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        return cls(dtype_name(tensor.dtype), shape, tuple(tensor.shape), low, high)

    def misfit(self, tensor: Tensor) -> str:
        """Why a tensor cannot be this input; empty if it can."""
        found = dtype_name(tensor.dtype)
        fixed = zip(self.shape, tensor.shape, strict=False)
        if found == self.dtype and tensor.dim() == len(self.shape) and all(a in (b, str(a)) for a, b in fixed):
            return ""
        return f"{found} {list(tensor.shape)}, but was exported as {self.dtype} {list(self.shape)}"

    def sample(self, seed: int = 0) -> Tensor:
        """A tensor of random numbers with the example's type, shape and range."""
        chance = torch.Generator().manual_seed(seed)
        low, high = (end if math.isfinite(end) else math.copysign(_FAR, end) for end in (self.low, self.high))
        numbers = low + (high - low) * torch.rand(self.example, generator=chance, dtype=torch.float64)
        dtype = RAW_TYPES[self.dtype]
        return (numbers if dtype.is_floating_point else numbers.round()).to(dtype)


@dataclass(frozen=True)
class Signature:
    """The calling convention.

    Args:
        arguments: those that the export was called with, in the order of `forward`.
        parameters: the names of all positional arguments of `forward`.
        outputs: the structure of the outputs, as `describe` gives it.
        inputs: the graph's inputs by name.
    """

    arguments: tuple[ExportedArgument, ...]
    parameters: tuple[str, ...]
    outputs: Any
    inputs: Mapping[str, GraphInput] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text that the file's metadata holds."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str = SIGNATURE) -> Signature:
        """The inverse of `to_json`.

        Raises:
            CorruptError: it is anything else. The file may come from anyone.
        """
        at = Place(where)
        try:
            known = json.loads(text)  # with infinite ends of a mask's range, which `Place.json` refuses
        except (ValueError, RecursionError) as error:
            at.fail(f"it is not JSON ({error})")
        known = at.fields(known, "it", [one.name for one in dataclasses.fields(cls)])
        inputs = {name: _input(one, at) for name, one in at.mapping(known["inputs"], "its inputs").items()}
        arguments = tuple(_argument(one, at) for one in at.sequence(known["arguments"], "its arguments"))
        parameters = tuple(at.text(one, "a parameter") for one in at.sequence(known["parameters"], "its parameters"))
        places: list[int] = []
        _check_structure(known["outputs"], places, at)
        if places != list(range(len(places))):
            at.fail("its outputs are not numbered one after the other")
        return cls(arguments, parameters, known["outputs"], inputs)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The graph's inputs for a call.

        Raises:
            ConfigError: an argument is missing, unknown, or not what it was at the export.
        """
        if len(args) > len(self.parameters):
            raise _misfit(f"takes {len(self.parameters)} positional arguments, not {len(args)}", where, self)
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        found: dict[str, Tensor] = {}
        for argument in self.arguments:
            value = given.pop(argument.name, None)
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if len(leaves) != len(argument.inputs):
                what = f"{argument.name} has {len(leaves)} tensors, but had {len(argument.inputs)} at the export"
                raise _misfit(what, where, self)
            if not argument.inputs and value is not None and repr(value) != argument.value:
                raise _misfit(f"{argument.name} is {value!r}, but was {argument.value} at the export", where, self)
            found |= zip(argument.inputs, leaves, strict=True)
        unknown = sorted(name for name, value in given.items() if value is not None)
        if unknown:
            raise _misfit(f"was exported without {', '.join(unknown)}", where, self)
        sizes: dict[int | str, int] = {}
        for name, tensor in found.items():
            wrong = self.inputs[name].misfit(tensor)
            if wrong:
                raise _misfit(f"{name} is {wrong}", where, self)
            for dimension, size in zip(self.inputs[name].shape, tensor.shape, strict=True):
                if sizes.setdefault(dimension, size) != size:
                    raise _misfit(f"{name} has size {size} where another input has {sizes[dimension]}", where, self)
        return found

    def sample(self) -> tuple[list[Any], dict[str, Any]]:
        """Arguments like those of the example: random numbers of the same shapes, within the same range.

        Raises:
            ConfigError: they would be too many, or an argument cannot be made again.
        """
        if (count := sum(math.prod(one.example) for one in self.inputs.values())) > _MOST_SAMPLED:
            raise ConfigError(
                f"the example of the export has {count:,} numbers, too many to try",
                where="inputs",
                remedy='Choose an engine yourself: engine="auto" has to call the model to time it.',
            )
        values = {}
        for argument in self.arguments:
            tensors = tuple(self.inputs[name].sample(i) for i, name in enumerate(argument.inputs))
            values[argument.name] = (tensors[0] if len(tensors) == 1 else tensors) if tensors else _literal(argument)
        places = [name for name, known in zip(self.parameters, values, strict=False) if name == known]
        return [values.pop(name) for name in places], values

    def check(self, where: str) -> None:
        """Check that the arguments have the inputs that they name.

        Raises:
            CorruptError: one has not.
        """
        for argument in self.arguments:
            for name in argument.inputs:
                if name not in self.inputs:
                    Place(where).fail(f"its argument {argument.name!r} needs an input {name!r}, which it does not have")

    @property
    def n_outputs(self) -> int:
        """The number of tensors among the outputs."""
        return len(output_names(self.outputs))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The outputs in their structure."""
        return _rebuild(self.outputs, tensors)


def _literal(argument: ExportedArgument) -> Any:
    try:
        if len(argument.value) > _LONGEST_VALUE:
            raise ValueError(f"{len(argument.value):,} characters")  # as the parser does
        return ast.literal_eval(argument.value)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"was {argument.value[:80]} at the export, which cannot be made again from its text",
            where=argument.name,
            remedy='Choose an engine yourself: engine="auto" has to call the model to time it.',
        ) from error


def _input(data: object, at: Place) -> GraphInput:
    known = at.fields(data, "an input", [one.name for one in dataclasses.fields(GraphInput)])
    shape = tuple(
        at.text(size, "a size") if isinstance(size, str) else at.whole(size, "a size")
        for size in at.sequence(known["shape"], "its shape")
    )
    example = at.shape(known["example"], "example")
    if len(example) != len(shape):
        at.fail("an input's example has other dimensions than its shape")
    low, high = known["low"], known["high"]
    if type(low) is not float or type(high) is not float:
        at.fail("the range of an input is not two numbers")
    return GraphInput(at.one_of(known["dtype"], RAW_TYPES, "the type of an input"), shape, example, low, high)


def _argument(data: object, at: Place) -> ExportedArgument:
    known = at.fields(data, "an argument", [one.name for one in dataclasses.fields(ExportedArgument)])
    taken = tuple(at.text(one, "an input") for one in at.sequence(known["inputs"], "the inputs of an argument"))
    return ExportedArgument(at.text(known["name"], "an argument"), taken, at.text(known["value"], "a value"))


def _check_structure(structure: object, places: list[int], at: Place, depth: int = 0) -> None:
    """Check a structure as `describe` gives it, and collect the places of its tensors."""
    if depth > _DEEPEST:
        at.fail(f"its outputs are nested more than {_DEEPEST} deep")
    if type(structure) is int:
        places.append(structure)
        return
    known = at.mapping(structure, "a part of its outputs")
    parts: Iterable[object]
    if known.keys() == {"value"}:
        value = known["value"]
        if value is not None and not isinstance(value, bool | int | float | str):
            at.fail("a value of its outputs is neither a number nor text")
        return
    if known.keys() == {"names", "plain"} and type(known["plain"]) is bool:
        parts = at.mapping(known["names"], "a part of its outputs").values()
    elif len(known) == 1 and (kind := next(iter(known))) in ("list", "tuple"):
        parts = at.sequence(known[kind], "a part of its outputs")
    else:
        at.fail("its outputs are of no known kind")
    for part in parts:
        _check_structure(part, places, at, depth + 1)


def _misfit(what: str, where: str, signature: Signature) -> ConfigError:
    taken = ", ".join(one.name for one in signature.arguments if one.inputs)
    return ConfigError(what, where=where, remedy=f"Call it as it was exported, with {taken}, or export it again.")


def signature_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Signature:
    """The calling convention of a call and its outputs.

    >>> signature_of(nn.Linear(2, 2), (torch.zeros(1, 2),), {}, torch.zeros(1, 2)).arguments
    (ExportedArgument(name='input', inputs=('input',), value=''),)
    """
    called = inspect.signature(model.forward)
    arguments: list[ExportedArgument] = []
    used: set[str] = set()
    for name, value in _named(called, args, kwargs):
        count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        inputs = (name,) if count == 1 else tuple(f"{name}_{i}" for i in range(count))
        if used & set(inputs):
            raise ConfigError(f"two inputs would be called {inputs[0]}", where="export", remedy="Rename an argument.")
        used |= set(inputs)
        arguments.append(ExportedArgument(name, inputs, "" if count else repr(value)))
    places = [p.name for p in called.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    places += [name for name, _ in _named(called, args, {}) if name not in places]
    return Signature(tuple(arguments), tuple(places), describe(outputs))


def _named(called: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments by name; those of `*args` are numbered."""
    found: list[tuple[str, Any]] = []
    for name, value in called.bind_partial(*args, **kwargs).arguments.items():
        kind = called.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found += [(f"{name}_{i}", item) for i, item in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found += value.items()
        else:
            found.append((name, value))
    return found


def output_names(structure: Any, prefix: str = "") -> list[str]:
    """A name for each tensor of a structure: keys and places, from outside to inside.

    >>> output_names(describe({"a": torch.zeros(1), "b": (None, torch.zeros(1))})), output_names(0)
    (['a', 'b_1'], ['output'])
    """
    if isinstance(structure, int):
        return [prefix or "output"]
    kind, parts = next(iter(structure.items()))
    if kind == "value":
        return []
    pairs = parts.items() if kind == "names" else enumerate(parts)
    before = f"{prefix}_" if prefix else "" if kind == "names" else "output_"
    return [found for key, one in pairs for found in output_names(one, f"{before}{key}")]


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among the leaves, in the order of `describe`."""
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def describe(outputs: Any) -> Any:
    """The structure of outputs as plain data: tensors by their place; None, numbers and texts as they are.

    Classes with named fields become `Outputs`; of any other kind of container only the tensors are kept, as a list.

    >>> describe({"a": torch.zeros(1), "b": (None, torch.zeros(1))})
    {'names': {'a': 0, 'b': {'tuple': [{'value': None}, 1]}}, 'plain': True}
    """
    return _describe(outputs, iter(range(len(tensors_of(outputs)))))


def _describe(value: Any, places: Any) -> Any:
    if isinstance(value, Tensor):
        return next(places)
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"names": {k: _describe(v, places) for k, v in value.items()}, "plain": type(value) is dict}
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [_describe(one, places) for one in value]}
    return {"list": [next(places) for _ in tensors_of(value)]}


def _rebuild(structure: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(structure, int):
        return tensors[structure]
    if "value" in structure:
        return structure["value"]
    if "names" in structure:
        made = {name: _rebuild(one, tensors) for name, one in structure["names"].items()}
        return made if structure["plain"] else Outputs(made)
    kind, parts = next(iter(structure.items()))
    rebuilt = [_rebuild(one, tensors) for one in parts]
    return rebuilt if kind == "list" else tuple(rebuilt)
