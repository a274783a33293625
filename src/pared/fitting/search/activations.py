"""Which modules could run in int8, how their input is best treated, and whether it pays on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from torch import Tensor, nn

from pared.fitting.calibration.observe import InputStats
from pared.fitting.calibration.sensitivity import InputNoise
from pared.fitting.config import Approach
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid
from pared.formats.grids import MOST_COLUMNS
from pared.model.contents import Stored
from pared.model.copies import clone_structure
from pared.runtime.kernels.outliers import columns_of
from pared.runtime.layers.counterpart import stand_in
from pared.runtime.layers.registry import Layer, layer_of, weights_of
from pared.runtime.profile import Kernel

# A table of embeddings is gathered in codes from this many weights on; below, it would save nothing worth having.
_LEAST_TABLE: Final = 1 << 16
# What a range has to be narrower by, for its outliers to be worth their columns.
_NARROWER: Final = 0.8


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

    def passes(self, activation: Activation) -> int:
        """About how many numbers an input makes the module touch more than a plain static one, for each row.

        A dynamic one, five times the input, to find the ranges and to round, and four times the output: zero points
        come off, scales come on, and what follows, an activation or the next layer's rounding, cannot join the product.
        A static one with outliers, three times the input, to pick columns and to join them.
        """
        outputs, *inputs = self.tensors[0].coded.shape
        if activation.mode == "dynamic":
            return 5 * math.prod(inputs) + 4 * outputs
        return 3 * math.prod(inputs) if activation.outliers else 0

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

    def options(self, mode: str) -> tuple[Activation, ...]:
        """The ways to treat the input in a mode: a static range holds all that was seen, or leaves out columns."""
        weights = tuple(self.weights)
        if mode != "static":
            return (Activation(mode, weights=weights),)  # type: ignore[arg-type]  # the modes come from LAYERS
        seen = self.inputs
        assert seen is not None
        plain = Activation("static", seen.low, seen.high, weights)
        low, high, outliers = seen.narrowed
        columns = math.prod(self.tensors[0].coded.shape[1:]) + len(columns_of(outliers))
        if high - low > _NARROWER * (seen.high - seen.low) or columns > MOST_COLUMNS:
            return (plain,)
        return Activation("static", low, high, weights, outliers), plain

    def activations(self, activation: Activation) -> dict[str, Activation]:
        """The same for each module that is concerned, by name."""
        alone = replace(activation, weights=("weight",))
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
        used.update(f"{prefix}{part}" for part in layer.children)
        if not attributes or name in used or (inputs is not None and name not in inputs):
            continue
        weights = {attribute: by_name.get(f"{prefix}{attribute}") for attribute in attributes}
        parts = {part: by_name.get(f"{prefix}{part}.weight") for part in layer.children}
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
    return math.prod(coded.shape[1:]) <= MOST_COLUMNS


@dataclass(frozen=True, eq=False)
class _Option:
    """A way to treat a module's input.

    Args:
        name: of the module.
        damage: that it does.
        passes: see `Candidate.passes`.
        activation: the way.
    """

    name: str
    damage: float
    passes: int
    activation: Activation

    def price(self, slower: _Option) -> float:
        """What it costs to take this one instead, for each number that need not be touched."""
        return (self.damage - slower.damage) / (slower.passes - self.passes)


def _within(modules: Sequence[Sequence[_Option]], budget: float) -> dict[str, Activation]:
    """As many modules as the budget allows, each in the way that costs least; then faster ways, while any is left."""
    chosen: dict[str, _Option] = {}
    for options in sorted(modules, key=lambda options: (options[0].damage, options[0].name)):
        budget -= options[0].damage
        if budget < 0:
            break
        chosen[options[0].name] = options[0]
    steps = [(fast.price(slow), fast.name, slow, fast) for options in modules for slow, fast in pairwise(options)]
    for _, name, slow, fast in sorted(steps, key=lambda step: step[:2]):
        # An infinite budget is no wish for damage.
        if chosen.get(name) is slow and fast.damage - slow.damage <= budget < math.inf:
            budget -= fast.damage - slow.damage
            chosen[name] = fast
    return {name: one.activation for name, one in chosen.items()}


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """From the least damage on, each the next that saves passes at the lowest price: prices rise."""
    found = [min(options, key=lambda one: (one.damage, one.passes))]
    while faster := [one for one in options if one.passes < found[-1].passes]:
        last = found[-1]
        found.append(min(faster, key=lambda one: (one.price(last), one.passes)))
    return found


def choose_activations(
    candidates: Sequence[Candidate], approach: Approach, noise: Mapping[str, InputNoise], budget: float
) -> dict[str, Activation]:
    """How each module's input is treated: the modules whose inputs cost least first, until the budget is spent.

    A module first gets the way that costs least. What is left of the budget then buys faster ones: static inputs, for
    the products of an input share its quantization, and a product gives codes to the next at once; and those without
    outliers.

    Args:
        candidates: modules that may run in int8.
        approach: "static" and "dynamic" allow that mode only; "auto" chooses for each module.
        noise: what rounding the input of each weight costs, by the weight's name; modules of which nothing is known
            cost nothing if the approach names their mode, and stay in float if it is "auto".
        budget: the damage that may be done in all; infinite for all modules that have the mode.
    """
    if approach == "weight_only":
        return {}
    costs: list[list[_Option]] = []
    chosen: dict[str, Activation] = {}
    products = {one.name for c in candidates if c.layer.modes != ("gather",) for one in c.tensors}
    for candidate in candidates:
        modes, known = candidate.layer.modes, candidate.noise(noise)
        if modes == ("gather",):
            # A table that is multiplied with outside of any layer is better decoded once than at every call.
            multiplied = known is not None and not any(one.name in products for one in candidate.tensors)
            if candidate.size >= _LEAST_TABLE and not multiplied:
                (chosen[candidate.name],) = candidate.options("gather")
            continue
        wanted = [mode for mode in modes if approach in ("auto", mode)]
        if not wanted or (known is None and approach == "auto"):
            continue
        found = [one for mode in wanted for one in candidate.options(mode)]
        options = [
            _Option(candidate.name, known.cost(one) if known else 0.0, candidate.passes(one), one) for one in found
        ]
        costs.append(_hull(options))
    chosen |= _within(costs, budget)
    # A tied weight is in codes for all of its owners or for none.
    split = {one.name for candidate in candidates if candidate.name not in chosen for one in candidate.tensors}
    return {
        name: activation
        for candidate in candidates
        if candidate.name in chosen and not any(one.name in split for one in candidate.tensors)
        for name, activation in candidate.activations(chosen[candidate.name]).items()
    }
