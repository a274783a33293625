"""Which modules could run in int8, and how the input of each is best treated within a budget of damage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import torch
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
from pared.runtime.layers.table import Layer, layer_of, weights_of
from pared.runtime.profile.timings import Kernel

# Embedding tables with fewer weights are decoded: looking rows up in codes would save too little memory.
_MIN_TABLE_WEIGHTS: Final = 1 << 16
# Outliers are worth their extra columns if the range without them is at most this share of the full range.
_NARROW_RANGE: Final = 0.8


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that could run in int8.

    Args:
        name: the module's name.
        module: the float module; copies of it are run, never the module.
        layer: its entry in the table of layers.
        weights: its weights, on int8 grids, by attribute.
        children: the `weight` of each child that it uses without calling it, by the child's name.
        inputs: what calibration saw of its input; None without calibration.
    """

    name: str
    module: nn.Module
    layer: Layer
    weights: Mapping[str, Stored]
    children: Mapping[str, Stored] = field(default_factory=dict)
    inputs: InputStats | None = None

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """All weights, those of the children too."""
        return (*self.weights.values(), *self.children.values())

    @property
    def size(self) -> int:
        """How many numbers the weights have."""
        return sum(math.prod(tensor.coded.shape) for tensor in self.tensors)

    def extra_work(self, activation: Activation) -> int:
        """About how many more numbers per row the module reads and writes than with a plain static input.

        A dynamic input costs five times the input's columns, to find ranges and to round, and four times the output's:
        zero points are subtracted, scales multiplied, and what follows (an activation or the next layer's rounding)
        cannot be merged into the product. A static input with outliers costs three times the input's columns, to pick
        the outlier columns and to append them.
        """
        outputs, *inputs = self.tensors[0].coded.shape
        if activation.mode == "dynamic":
            return 5 * math.prod(inputs) + 4 * outputs
        return 3 * math.prod(inputs) if activation.outliers else 0

    def counterpart(self, activation: Activation, kernel: Kernel = "int8") -> nn.Module:
        """A copy of the module alone, in int8 or in bfloat16."""
        copied = self.decoded()
        for name, own_activation in self.activations(activation).items():
            module = copied.get_submodule(name.removeprefix(self.name).removeprefix("."))
            stored = self.weights if module is copied else {"weight": self.children[name.rpartition(".")[2]]}
            coded = {attribute: tensor.coded for attribute, tensor in stored.items()}
            stand_in(module, coded, own_activation, in_bfloat16=kernel == "bfloat16")
        return copied

    def decoded(self) -> nn.Module:
        """A copy of the module alone, in float, with the weights that the codes stand for."""
        coded_by_id = {id(self.module._parameters[name]): tensor.coded for name, tensor in self.weights.items()}
        for child, tensor in self.children.items():
            coded_by_id[id(self.module.get_submodule(child)._parameters["weight"])] = tensor.coded

        def content(tensor: Tensor) -> Tensor:
            coded = coded_by_id.get(id(tensor))
            return tensor.detach() if coded is None else coded.decode()

        copied = clone_structure(self.module, content).eval()
        copied._forward_hooks.clear()
        copied._forward_pre_hooks.clear()
        return copied

    def options(self, mode: str) -> tuple[Activation, ...]:
        """How the input may be treated in a mode: a static range holds all that was seen, or leaves outliers out."""
        weights = tuple(self.weights)
        if mode != "static":
            return (Activation(mode, weights=weights),)  # type: ignore[arg-type]  # the modes come from LAYERS
        seen = self.inputs
        assert seen is not None
        plain = Activation("static", seen.low, seen.high, weights)
        low, high, outliers = seen.without_outliers
        columns = math.prod(self.tensors[0].coded.shape[1:]) + len(columns_of(outliers))
        if high - low > _NARROW_RANGE * (seen.high - seen.low) or columns > MOST_COLUMNS:
            return (plain,)
        return Activation("static", low, high, weights, outliers), plain

    def activations(self, activation: Activation) -> dict[str, Activation]:
        """The same treatment for the module and for the children that it uses, by the module's name."""
        for_children = replace(activation, weights=("weight",))
        children = {f"{self.name}.{child}".removeprefix("."): for_children for child in self.children}
        return {self.name: activation, **children}

    def noise(self, known: Mapping[str, InputNoise]) -> InputNoise | None:
        """What noise in its input costs; None if that is not known.

        Args:
            known: by the name of a weight; for modules that the table of layers runs, by that of the first weight.
        """
        names = [tensor.name for tensor in self.weights.values()]
        total = InputNoise(0.0, 0.0)
        for name in names[:1] if self.layer.forward else names:
            if name not in known:
                return None
            total += known[name]
        scales = [tensor.coded.parts["scale"] for tensor in self.weights.values() if "scale" in tensor.coded.parts]
        # An error of an input times its scale is one of the input that is larger by its inverse.
        more = float(scales[0].double().square().reciprocal().mean()) if scales else 1.0
        return replace(total, total=total.total * more)


def find_candidates(
    model: nn.Module, stored: Sequence[Stored], inputs: Mapping[str, InputStats] | None
) -> list[Candidate]:
    """The modules whose weights are on int8 grids and that calibration called; a tied weight needs all its owners.

    Args:
        model: the float model.
        stored: its tensors, in their formats.
        inputs: what calibration saw, by module name; None without calibration: every module counts as called.
    """
    by_name = {name: tensor for tensor in stored for name in tensor.names if _fits(tensor.coded)}
    candidates: list[Candidate] = []
    used: set[str] = set()  # children that modules before them use without a call
    for name, module in model.named_modules(remove_duplicate=False):
        layer, attributes = layer_of(module), weights_of(module)
        if layer is None:
            continue
        prefix = f"{name}." if name else ""
        used.update(f"{prefix}{child}" for child in layer.children)
        if not attributes or name in used or (inputs is not None and name not in inputs):
            continue
        weights = {attribute: by_name.get(f"{prefix}{attribute}") for attribute in attributes}
        children = {child: by_name.get(f"{prefix}{child}.weight") for child in layer.children}
        if None not in (*weights.values(), *children.values()):
            seen = _scaled(None if inputs is None else inputs[name], weights.values())
            candidates.append(Candidate(name, module, layer, weights, children, seen))  # type: ignore[arg-type]  # checked
    while (kept := _with_all_owners(candidates)) != candidates:
        candidates = kept
    return candidates


def _scaled(seen: InputStats | None, weights: Iterable[Stored | None]) -> InputStats | None:
    """What calibration saw of an input, times the scales of the weight's columns."""
    scale = next((one.coded.parts["scale"] for one in weights if one is not None and "scale" in one.coded.parts), None)
    if seen is None or scale is None:
        return seen
    if seen.lows is None or seen.highs is None:
        most = float(scale.max())
        return replace(seen, low=seen.low * most, high=seen.high * most)
    lows, highs = seen.lows * scale, seen.highs * scale
    low, high = min(float(lows.min()), 0.0), max(float(highs.max()), 0.0)
    return replace(seen, low=low, high=high, lows=lows, highs=highs)


def _with_all_owners(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates whose tied weights belong to candidates under every name."""
    covered = {name for candidate in candidates for name in _names(candidate)}
    return [c for c in candidates if all(name in covered for tensor in c.tensors for name in tensor.names)]


def _names(candidate: Candidate) -> list[str]:
    prefix = f"{candidate.name}." if candidate.name else ""
    children = [f"{prefix}{child}.weight" for child in candidate.children]
    return [f"{prefix}{attribute}" for attribute in candidate.weights] + children


def _fits(coded: Coded) -> bool:
    """Whether the kernels take the weight: int8 codes, few enough columns that every sum fits into 32 bits.

    What is in float64 asks for more than the float32 that they return.
    """
    if not isinstance(coded.format, Grid) or coded.format.codes != "int8" or coded.dtype == torch.float64:
        return False
    # A group of columns with a step of its own is for no kernel.
    in_groups = coded.view is not None and coded.view.split != coded.shape
    return not in_groups and math.prod(coded.shape[1:]) <= MOST_COLUMNS


@dataclass(frozen=True, eq=False)
class _InputOption:
    """One way to treat a module's input, with the damage that it does and its `Candidate.extra_work`."""

    name: str
    damage: float
    work: int
    activation: Activation

    def price(self, slower: _InputOption) -> float:
        """The damage of taking this option instead of a slower one, per unit of work saved."""
        return (self.damage - slower.damage) / (slower.work - self.work)


def _within(modules: Sequence[Sequence[_InputOption]], budget: float) -> dict[str, Activation]:
    """As many modules as the budget allows, each with its cheapest option; then faster options while budget is left."""
    chosen: dict[str, _InputOption] = {}
    for options in sorted(modules, key=lambda options: (options[0].damage, options[0].name)):
        budget -= options[0].damage
        if budget < 0:
            break
        chosen[options[0].name] = options[0]
    steps = [(fast.price(slow), fast.name, slow, fast) for options in modules for slow, fast in pairwise(options)]
    for _, name, slow, fast in sorted(steps, key=lambda step: step[:2]):
        # An infinite budget asks for every module, not for damage.
        if chosen.get(name) is slow and fast.damage - slow.damage <= budget < math.inf:
            budget -= fast.damage - slow.damage
            chosen[name] = fast
    return {name: option.activation for name, option in chosen.items()}


def _hull(options: Sequence[_InputOption]) -> list[_InputOption]:
    """The options worth taking, from least damage to least work: each saves work at the lowest price left."""
    hull = [min(options, key=lambda option: (option.damage, option.work))]
    while faster := [option for option in options if option.work < hull[-1].work]:
        last = hull[-1]
        hull.append(min(faster, key=lambda option: (option.price(last), option.work)))
    return hull


def choose_activations(
    candidates: Sequence[Candidate], approach: Approach, noise: Mapping[str, InputNoise], budget: float
) -> dict[str, Activation]:
    """How each module's input is treated: the modules whose inputs cost least first, until the budget is spent.

    A module first gets the treatment that does least damage. What is left of the budget then buys faster ones: static
    inputs, because all products of an input share its quantization and one product can give codes to the next; and
    static inputs without outliers.

    Args:
        candidates: modules that may run in int8.
        approach: "static" and "dynamic" allow that mode only; "auto" chooses for each module; "weight_only" gives none.
        noise: what rounding the input of each weight costs, by the weight's name. Modules that are not in it cost
            nothing if the approach names their mode, and stay in float if it is "auto".
        budget: the damage that may be done in all; infinite: every module that has the mode.

    Returns:
        the treatment by module name; modules that are not named stay in float.
    """
    if approach == "weight_only":
        return {}
    costs: list[list[_InputOption]] = []
    chosen: dict[str, Activation] = {}
    multiplied = {tensor.name for c in candidates if c.layer.modes != ("gather",) for tensor in c.tensors}
    for candidate in candidates:
        modes, known = candidate.layer.modes, candidate.noise(noise)
        if modes == ("gather",):
            # A table that code outside of any layer multiplies with is better decoded once than at every call.
            decode_once = known is not None and not any(tensor.name in multiplied for tensor in candidate.tensors)
            if candidate.size >= _MIN_TABLE_WEIGHTS and not decode_once:
                (chosen[candidate.name],) = candidate.options("gather")
            continue
        allowed = [mode for mode in modes if approach in ("auto", mode)]
        if not allowed or (known is None and approach == "auto"):
            continue
        options = []
        for activation in (activation for mode in allowed for activation in candidate.options(mode)):
            damage = known.cost(activation) if known else 0.0
            options.append(_InputOption(candidate.name, damage, candidate.extra_work(activation), activation))
        costs.append(_hull(options))
    chosen |= _within(costs, budget)
    # A tied weight is in codes for all of its owners or for none.
    in_float = {tensor.name for c in candidates if c.name not in chosen for tensor in c.tensors}
    activations: dict[str, Activation] = {}
    for candidate in candidates:
        if candidate.name in chosen and not any(tensor.name in in_float for tensor in candidate.tensors):
            activations |= candidate.activations(chosen[candidate.name])
    return activations
