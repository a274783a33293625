"""LSTM and GRU on int8 weights: all steps of a sequence in one call of PyTorch's own dynamic int8 layers.

The product of the input is computed for the whole sequence at once, that of the state at each step. Each puts its
activations on one grid of their own range: a state lies within (-1, 1) and needs no calibration. Gates and states are
floats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from pared.runtime.kernels.machine import FULL_LEVELS, levels_for
from pared.runtime.kernels.machine import available as products_available
from pared.switches import ignoring, quantized_engine

Kind = Literal["lstm", "gru"]

# oneDNN is 2 to 10 % faster for whole sequences, but two threads must not call one of its packed weights at once: about
# one call in 5,000 then returned wrong numbers (torch 2.13).
_ENGINE: Final = "fbgemm"


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of one direction of one layer as plain codes; `gates` is 4 for an LSTM and 3 for a GRU.

    Args:
        codes: int8 of shape (gates * hidden, inputs), and (gates * hidden, hidden).
        steps: float32 of shape (gates * hidden,), one tensor for each of the codes.
        biases: floats of shape (gates * hidden,), or None, for each of the codes.
    """

    codes: tuple[Tensor, Tensor]
    steps: tuple[Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def levels(self) -> int:
        """The largest activation code at which both products are exact."""
        return min(map(levels_for, self.codes))


@functools.cache
def available() -> str:
    """Why these kernels cannot run here, in words; empty if they can."""
    if reason := products_available():
        return reason
    codes, steps = torch.ones(4, 1, dtype=torch.int8, device="cpu"), torch.ones(4, device="cpu")
    zero = torch.zeros(1, 1, 1, device="cpu")
    try:
        run("lstm", zero, (zero, zero), [pack(Weights((codes, codes), (steps, steps)))], 1)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this build of PyTorch has no int8 recurrent layers: {str(error).splitlines()[0]}"
    return ""


def pack(weights: Weights) -> Any:
    """Pack one direction of one layer for `run`; the result can be neither copied nor pickled."""
    floats = [
        torch.zeros(len(codes), device="cpu") if bias is None else bias.detach().float().contiguous()
        for codes, bias in zip(weights.codes, weights.biases, strict=True)
    ]
    packed = map(_pack_product, weights.codes, weights.steps, floats)
    narrow = weights.levels < FULL_LEVELS
    return torch.ops.quantized.make_quantized_cell_params_dynamic(*packed, *floats, narrow)


def _pack_product(codes: Tensor, steps: Tensor, bias: Tensor) -> Any:
    """A weight in an engine's own form. PyTorch reads the engine from a global setting; the form remembers it."""
    weight = _as_quantized(codes, steps)
    with quantized_engine(_ENGINE):
        return torch.ops.quantized.linear_prepack(weight, bias)


def _as_quantized(codes: Tensor, steps: Tensor) -> Tensor:
    """Codes and steps as a quantized tensor, the only kind that these operators take.

    PyTorch plans to remove it: `available` will then say so, and layers will run in float.
    """
    zeros = torch.zeros(len(codes), dtype=torch.int64, device="cpu")
    with ignoring(UserWarning, "torch.quantize_per_tensor"):
        made: Tensor = torch._make_per_channel_quantized_tensor(codes.contiguous(), steps.double(), zeros, 0)
    return made


def run(
    kind: Kind, x: Tensor, state: Sequence[Tensor], packed: Sequence[Any], layers: int, sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run a whole sequence through all layers.

    Args:
        kind: "lstm" or "gru".
        x: float32 (steps, batch, inputs); with sizes: (steps of all sequences, inputs), as in a `PackedSequence`.
        state: the first hidden state, and of an LSTM the first cell state: float32 (layers * directions, batch,
            hidden).
        packed: from `pack`: the one or two directions of each layer, one layer after the other.
        layers: the number of layers.
        sizes: int64, the size of the batch at each step, for packed sequences.

    Returns:
        the outputs of all steps, and the last state or states.
    """
    data = (x,) if sizes is None else (x, sizes)
    batch_first = (False,) if sizes is None else ()
    options = (list(packed), True, layers, 0.0, False, len(packed) > layers, *batch_first)
    found: tuple[Tensor, ...]
    if kind == "lstm":
        found = torch.quantized_lstm(*data, tuple(state), *options, use_dynamic=True)
    else:
        found = torch.quantized_gru(*data, state[0], *options)
    return found
