"""Which modules could run in int8, how their input is best treated, and whether it pays on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.config import Approach
from pared.contents import Stored
from pared.formats import Coded, Grid
from pared.layers import Activation, Layer, layer_of, stand_in, weights_of
from pared.layers.activation import Mode
from pared.profile import Kernel, Profile, Timing, measure, this_machine
from pared.sensitivity import InputNoise
from pared.stats import InputStats
from pared.tensors import clone_structure

_KERNELS: Final[tuple[Kernel, ...]] = ("bfloat16", "int8")
# A table of embeddings is gathered in codes from this many weights on; below, it would save nothing worth having.
_LEAST_TABLE: Final = 1 << 16
# A sum of so many products of the largest codes, 255 * 127, still fits 32 bits.
_MOST_COLUMNS: Final = (2**31 - 1) // (255 * 127)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that could run in int8.

    Args:
        name: of the module.
        module: the float module, of which a copy is tried.
        layer: its entry in the table of layers.
        weights: its weights, on int8 grids, by attribute.
        parts: of children that it uses without calling them, the `weight`, by the child's name.
        inputs: what calibration saw; None without calibration.
    """

    name: str
    module: nn.Module
    layer: Layer
    weights: Mapping[str, Stored]
    parts: Mapping[str, Stored] = field(default_factory=dict)
    inputs: InputStats | None = None

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """All of them."""
        return (*self.weights.values(), *self.parts.values())

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(math.prod(one.coded.shape) for one in self.tensors)

    @property
    def passes(self) -> int:
        """About how many numbers a dynamic input makes the module touch more than a static one, for each row.

        Five times the input, to find the ranges and to round; four times the output: zero points come off, scales come
        on, and what follows, an activation or the next layer's rounding, cannot join the product.
        """
        outputs, *inputs = self.tensors[0].coded.shape
        return 5 * math.prod(inputs) + 4 * outputs

    def counterpart(self, activation: Activation, kernel: Kernel = "int8") -> nn.Module:
        """The module by itself, in int8 or in bfloat16."""
        alone = self.decoded()
        for name, own in self.activations(activation).items():
            part = alone.get_submodule(name.removeprefix(self.name).removeprefix("."))
            stored = self.weights if part is alone else {"weight": self.parts[name.rpartition(".")[2]]}
            coded = {attribute: one.coded for attribute, one in stored.items()}
            stand_in(part, coded, own, in_bfloat16=kernel == "bfloat16")
        return alone

    def decoded(self) -> nn.Module:
        """The module by itself, in float, with the weights that the codes stand for."""
        known = {id(self.module._parameters[attribute]): one.coded for attribute, one in self.weights.items()}
        known |= {id(self.module.get_submodule(n)._parameters["weight"]): one.coded for n, one in self.parts.items()}

        def content(tensor: Tensor) -> Tensor:
            coded = known.get(id(tensor))
            return tensor.detach() if coded is None else coded.decode()

        alone = clone_structure(self.module, content).eval()
        alone._forward_hooks.clear()
        alone._forward_pre_hooks.clear()
        return alone

    def activation(self, mode: str) -> Activation:
        """How the input is treated in a mode; "static" takes the range of all that was seen."""
        weights = tuple(self.weights)
        if mode == "static":
            assert self.inputs is not None
            return Activation("static", self.inputs.low, self.inputs.high, weights)
        return Activation(mode, weights=weights)  # type: ignore[arg-type]  # the modes come from LAYERS

    def activations(self, activation: Activation) -> dict[str, Activation]:
        """The same for each module that is concerned, by name."""
        alone = Activation(activation.mode, activation.low, activation.high)
        return {self.name: activation} | {f"{self.name}.{part}".removeprefix("."): alone for part in self.parts}

    def noise(self, known: Mapping[str, InputNoise]) -> InputNoise | None:
        """What noise in its input costs: of each weight by name, or of the whole module under its first weight's."""
        names = [one.name for one in self.weights.values()]
        total = InputNoise(0.0, 0.0)
        for name in names[:1] if self.layer.forward else names:
            if name not in known:
                return None
            total += known[name]
        return total


def find_candidates(
    model: nn.Module, stored: Sequence[Stored], inputs: Mapping[str, InputStats] | None
) -> list[Candidate]:
    """The modules whose weights are on int8 grids, and that calibration called (all, without calibration).

    A tied weight counts only if every module that owns it is a candidate too.
    """
    by_name = {name: one for one in stored for name in one.names if _fits(one.coded)}
    found: list[Candidate] = []
    used: set[str] = set()  # parts of modules that came before
    for name, module in model.named_modules(remove_duplicate=False):
        layer, attributes = layer_of(module), weights_of(module)
        if layer is None:
            continue
        prefix = f"{name}." if name else ""
        used.update(f"{prefix}{part}" for part in layer.parts)
        if not attributes or name in used or (inputs is not None and name not in inputs):
            continue
        weights = {attribute: by_name.get(f"{prefix}{attribute}") for attribute in attributes}
        parts = {part: by_name.get(f"{prefix}{part}.weight") for part in layer.parts}
        if None not in (*weights.values(), *parts.values()):
            seen = None if inputs is None else inputs[name]
            found.append(Candidate(name, module, layer, weights, parts, seen))  # type: ignore[arg-type]  # checked
    while (kept := _whole(found)) != found:
        found = kept
    return found


def _whole(candidates: list[Candidate]) -> list[Candidate]:
    """Those of whose weights every name belongs to one of them."""
    covered = {name for candidate in candidates for name in _names(candidate)}
    return [c for c in candidates if all(name in covered for one in c.tensors for name in one.names)]


def _names(candidate: Candidate) -> list[str]:
    prefix = f"{candidate.name}." if candidate.name else ""
    return [f"{prefix}{a}" for a in candidate.weights] + [f"{prefix}{part}.weight" for part in candidate.parts]


def _fits(coded: Coded) -> bool:
    """Whether the kernels take the weight: int8 codes, and so few columns that no sum leaves 32 bits."""
    if not isinstance(coded.format, Grid) or coded.format.codes != "int8":
        return False
    return math.prod(coded.shape[1:]) <= _MOST_COLUMNS


@dataclass(frozen=True, eq=False)
class _Cost:
    """The damage of each mode of a module's input.

    Args:
        name: of the module.
        damage: by mode.
        activations: one for each mode.
        passes: see `Candidate.passes`.
    """

    name: str
    damage: Mapping[Mode, float]
    activations: Sequence[Activation]
    passes: int = 1

    @property
    def cheapest(self) -> Activation:
        return min(self.activations, key=lambda one: self.damage[one.mode])

    @property
    def extra(self) -> float:
        """What a static input costs beyond the cheapest."""
        return self.damage.get("static", math.inf) - self.damage[self.cheapest.mode]


def _within(costs: Sequence[_Cost], budget: float) -> dict[str, Activation]:
    """As many modules as the budget allows, then as many static ones."""
    chosen: dict[str, Activation] = {}
    for one in sorted(costs, key=lambda one: (one.damage[one.cheapest.mode], one.name)):
        budget -= one.damage[one.cheapest.mode]
        if budget < 0:
            return chosen
        chosen[one.name] = one.cheapest
    for one in sorted(costs, key=lambda one: (one.extra / one.passes, one.name)):
        if "static" not in one.damage or one.extra > budget:
            continue
        budget -= one.extra
        chosen[one.name] = next(found for found in one.activations if found.mode == "static")
    return chosen


def choose_activations(
    candidates: Sequence[Candidate], approach: Approach, noise: Mapping[str, InputNoise], budget: float
) -> dict[str, Activation]:
    """How each module's input is treated: the modules whose inputs cost least first, until the budget is spent.

    With "auto" a module first gets the mode that costs less. What is left of the budget then buys static inputs, which
    are faster: the products of an input share its quantization, and a product gives codes to the next at once.

    Args:
        candidates: modules that may run in int8.
        approach: "static" and "dynamic" allow that mode only; "auto" chooses for each module.
        noise: what rounding the input of each weight costs, by the weight's name; modules of which nothing is known
            cost nothing if the approach names their mode, and stay in float if it is "auto".
        budget: the damage that may be done in all; infinite for all modules that have the mode.
    """
    if approach == "weight_only":
        return {}
    costs: list[_Cost] = []
    chosen: dict[str, Activation] = {}
    products = {one.name for c in candidates if c.layer.modes != ("gather",) for one in c.tensors}
    for candidate in candidates:
        modes, known = candidate.layer.modes, candidate.noise(noise)
        if modes == ("gather",):
            # A table that is multiplied with outside of any layer is better decoded once than at every call.
            multiplied = known is not None and not any(one.name in products for one in candidate.tensors)
            if candidate.size >= _LEAST_TABLE and not multiplied:
                chosen[candidate.name] = candidate.activation("gather")
            continue
        wanted = [mode for mode in modes if approach in ("auto", mode)]
        if not wanted or (known is None and approach == "auto"):
            continue
        found = [candidate.activation(mode) for mode in wanted]
        damage = {one.mode: known.cost(one) if known else 0.0 for one in found}
        costs.append(_Cost(candidate.name, damage, found, candidate.passes))
    chosen |= _within(costs, budget)
    # A tied weight is in codes for all of its owners or for none.
    split = {one.name for candidate in candidates if candidate.name not in chosen for one in candidate.tensors}
    return {
        name: activation
        for candidate in candidates
        if candidate.name in chosen and not any(one.name in split for one in candidate.tensors)
        for name, activation in candidate.activations(chosen[candidate.name]).items()
    }


def time_layers(candidates: Sequence[Candidate], activations: Mapping[str, Activation]) -> Profile:
    """Measure each module in float32, bfloat16 and int8 on a call that calibration saw; equal ones only once."""
    timings: dict[str, Timing] = {}
    known: dict[object, Timing] = {}
    for candidate in candidates:
        activation, seen = activations.get(candidate.name), candidate.inputs
        if activation is None or activation.mode == "gather" or seen is None or candidate.layer.missing():
            continue
        dtype = next(iter(candidate.weights.values())).coded.dtype
        shapes = () if seen.call is None else tuple(_shape(x) for x in tree_leaves((seen.call.args, seen.call.kwargs)))
        own = tuple(tuple(one.shape) for one in (*candidate.module.parameters(), *candidate.module.buffers()))
        key = (type(candidate.module), repr(candidate.module), own, seen.shape, shapes, dtype, activation.mode)
        if key not in known:
            forms: dict[Kernel, nn.Module] = {"float32": candidate.decoded()}
            forms |= {kernel: candidate.counterpart(activation, kernel) for kernel in _KERNELS}
            known[key] = measure(forms, seen.shape, dtype, seen.call)
        timings |= dict.fromkeys(candidate.activations(activation), known[key])
    return Profile(this_machine(), timings)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
