"""Which layers could run in int8, how their input is best treated, and whether it pays on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from pared.config import Approach
from pared.contents import Stored
from pared.formats import Coded, Grid
from pared.layers import Activation, is_candidate, modes_of, stand_in
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
    """A layer that could run in int8.

    Args:
        name: of the module.
        module: the float module, of which a copy is tried.
        coded: its weight, on an int8 grid.
        inputs: what calibration saw; None without calibration.
        weight: the first name of the weight, which may belong to other modules too.
    """

    name: str
    module: nn.Module
    coded: Coded
    inputs: InputStats | None
    weight: str

    def counterpart(self, activation: Activation, kernel: Kernel = "int8") -> nn.Module:
        """The layer by itself, in int8 or in bfloat16."""
        alone = self.decoded()
        stand_in(alone, self.coded, activation, in_bfloat16=kernel == "bfloat16")
        return alone

    def decoded(self) -> nn.Module:
        """The layer by itself, in float, with the weight that the codes stand for."""
        weight = self.module._parameters["weight"]

        def content(tensor: Tensor) -> Tensor:
            return self.coded.decode() if tensor is weight else tensor.detach()

        alone = clone_structure(self.module, content).eval()
        alone._forward_hooks.clear()
        alone._forward_pre_hooks.clear()
        return alone

    def activation(self, mode: str) -> Activation:
        """How the input is treated in a mode; "static" takes the range of all that was seen."""
        if mode == "static":
            assert self.inputs is not None
            return Activation("static", self.inputs.low, self.inputs.high)
        return Activation(mode)  # type: ignore[arg-type]  # the modes come from LAYERS


def find_candidates(
    model: nn.Module, stored: Sequence[Stored], inputs: Mapping[str, InputStats] | None
) -> list[Candidate]:
    """The layers whose weight is on an int8 grid, and that calibration called (all, without calibration).

    A tied weight counts only if every module that owns it is a candidate too.
    """
    found = []
    for one in stored:
        owners = [name.rpartition(".") for name in one.names]
        modules = {owner: model.get_submodule(owner) for owner, _, _ in owners}
        fits = _fits(one.coded) and all(attribute == "weight" for _, _, attribute in owners)
        if not fits or not all(map(is_candidate, modules.values())):
            continue
        if inputs is not None and not all(owner in inputs for owner in modules):
            continue
        found += [
            Candidate(n, m, one.coded, inputs[n] if inputs is not None else None, one.name) for n, m in modules.items()
        ]
    return found


def _fits(coded: Coded) -> bool:
    """Whether the kernels take the weight: int8 codes, and so few columns that no sum leaves 32 bits."""
    if not isinstance(coded.format, Grid) or coded.format.codes != "int8":
        return False
    return math.prod(coded.shape[1:]) <= _MOST_COLUMNS


def choose_activations(
    candidates: Sequence[Candidate], approach: Approach, noise: Mapping[str, InputNoise], budget: float
) -> dict[str, Activation]:
    """How each layer's input is treated: the layers whose inputs cost least first, until the budget is spent.

    Args:
        candidates: layers that may run in int8.
        approach: "static" and "dynamic" allow that mode only; "auto" takes for each layer the one that costs less.
        noise: what rounding the input of each weight costs, by the weight's name; layers of which nothing is known
            cost nothing if the approach names their mode, and stay in float if it is "auto".
        budget: the damage that may be done in all; infinite for all layers that have the mode.
    """
    if approach == "weight_only":
        return {}
    costs: list[tuple[float, str, Activation]] = []
    chosen: dict[str, Activation] = {}
    for candidate in candidates:
        modes = modes_of(candidate.module)
        if modes == ("gather",):
            if candidate.coded.parts["codes"].numel() >= _LEAST_TABLE:
                chosen[candidate.name] = candidate.activation("gather")
            continue
        known = noise.get(candidate.weight)
        if known is None and (approach == "auto" or approach not in modes):
            continue
        found = [candidate.activation(mode) for mode in modes if approach in ("auto", mode)]
        costs += [min(((known.cost(a) if known else 0.0, candidate.name, a) for a in found), key=lambda one: one[0])]
    for cost, name, activation in sorted(costs, key=lambda one: (one[0], one[1])):
        budget -= cost
        if budget < 0:
            break
        chosen[name] = activation
    # A tied weight is in codes for all of its owners or for none.
    split = {id(c.coded) for c in candidates if c.name not in chosen}
    return {c.name: chosen[c.name] for c in candidates if c.name in chosen and id(c.coded) not in split}


def time_layers(candidates: Sequence[Candidate], activations: Mapping[str, Activation]) -> Profile:
    """Measure each layer in float32, bfloat16 and int8 on the shape that calibration saw; equal layers only once."""
    timings: dict[str, Timing] = {}
    known: dict[object, Timing] = {}
    for candidate in candidates:
        activation = activations.get(candidate.name)
        if activation is None or activation.mode == "gather" or candidate.inputs is None:
            continue
        key = (repr(candidate.module), candidate.inputs.shape, candidate.coded.dtype, activation.mode)
        if key not in known:
            forms: dict[Kernel, nn.Module] = {"float32": candidate.decoded()}
            forms |= {kernel: candidate.counterpart(activation, kernel) for kernel in _KERNELS}
            known[key] = measure(forms, candidate.inputs.shape, candidate.coded.dtype)
        timings[candidate.name] = known[key]
    return Profile(this_machine(), timings)
