"""LSTM and GRU on int8 weights: all steps of a sequence in one call of PyTorch's own dynamic int8 layers.

These put a whole tensor on one grid of its own range, so that the samples of a batch would change each other's results.
Therefore every state gets two more units that stay at 1 and -1 whatever happens: the gates' biases hold them there,
and no weight reads them. So all states, which lie within (-1, 1), have the same grid at each step of every call. The
first layer's input has no such bounds: its product takes the floats as they are, and weights in float16.
Gates and states are floats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import reason_of
from pared.runtime.kernels.fbgemm.rows import packed_product
from pared.runtime.kernels.machine import FULL_LEVELS, levels_for
from pared.runtime.kernels.machine import available as products_available

Kind = Literal["lstm", "gru"]

# The units at 1 and -1, and the gates' biases that keep them there: in a sigmoid, 40 is 1 and -40 is 0. An LSTM's gates
# are input, forget, cell and output; a GRU's are reset, update and new.
ENDS: Final = (1.0, -1.0)
SATURATED: Final = 40.0
# Weights in float16 lose digits where their largest is smaller, and are cut where it is larger.
_SMALLEST, _LARGEST = 2.0**-10, 2.0**15
KEEPING: Final = {4: (-SATURATED, SATURATED, 0.0, SATURATED), 3: (0.0, SATURATED, 0.0)}


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
    codes, steps = torch.ones(4, 1, dtype=torch.int8, device="cpu"), torch.ones(4, dtype=torch.float32, device="cpu")
    zero = torch.zeros(1, 1, 1, dtype=torch.float32, device="cpu")
    try:
        run("lstm", zero, (zero, zero), [pack(Weights((codes, codes), (steps, steps)))], 1)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this build of PyTorch has no int8 recurrent layers: {reason_of(error)}"
    return ""


def input_scale(largest: float) -> float:
    """The power of two by which inputs are multiplied, and weights divided, so that float16 holds the weights.

    Args:
        largest: the magnitude of the largest weight that reads the layer's own input.

    Returns:
        1 for all but very small or large ones.

    >>> input_scale(0.5), input_scale(0.0), input_scale(2.0**-20), input_scale(2.0**20)
    (1.0, 1.0, 9.5367431640625e-07, 1048576.0)
    """
    if not largest or _SMALLEST <= largest <= _LARGEST:
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def pack(weights: Weights, ways: int = 0, scale: float = 1.0) -> Any:
    """Pack one direction of one layer for `run`; the result can be neither copied nor pickled.

    Args:
        weights: plain ones.
        ways: the number of directions of the layer below, whose outputs are this one's inputs; 0: there is none.
        scale: by what the inputs are multiplied, if there is none: see `input_scale`.
    """
    hidden = weights.codes[1].shape[1]
    gates = len(weights.codes[1]) // hidden
    steps = [with_units(steps, gates) for steps in weights.steps]
    floats = [
        with_units(steps.new_zeros(gates * hidden) if bias is None else bias.detach().float(), gates)
        for steps, bias in zip(weights.steps, weights.biases, strict=True)
    ]
    floats[0].view(gates, -1)[:, hidden:] = torch.tensor(KEEPING[gates], dtype=torch.float32, device="cpu")[:, None]
    own, last = (with_units(codes, gates) for codes in weights.codes)
    narrow = weights.levels < FULL_LEVELS
    state = packed_product(with_columns(last, 1), steps[1], floats[1])
    if ways:
        inputs = packed_product(with_columns(own, ways), steps[0], floats[0])
    else:
        decoded = own.float() * (steps[0] / scale)[:, None]
        inputs = torch.ops.quantized.linear_prepack_fp16(decoded, floats[0])
    return torch.ops.quantized.make_quantized_cell_params_dynamic(inputs, state, *floats, narrow)


def with_units(rows: Tensor, gates: int) -> Tensor:
    """Rows of all gates, with rows of zeros for the additional units of each."""
    each = rows.reshape(gates, -1, *rows.shape[1:])
    more = each.new_zeros(gates, len(ENDS), *rows.shape[1:])
    return torch.cat([each, more], 1).flatten(0, 1)


def with_columns(codes: Tensor, ways: int) -> Tensor:
    """A weight that reads the states of one or two directions, with columns of zeros for the additional units."""
    return F.pad(codes.unflatten(1, (ways, -1)), (0, len(ENDS))).flatten(1)


def run(
    kind: Kind, x: Tensor, state: Sequence[Tensor], packed: Sequence[Any], layers: int, sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run a whole sequence through all layers.

    Args:
        kind: "lstm" or "gru".
        x: float32 (steps, batch, inputs); with sizes: (steps of all sequences, inputs), as in a `PackedSequence`.
        state: the first hidden state, and of an LSTM the first cell state: float32 (layers * directions, batch,
            hidden). The hidden state lies within -1..1.
        packed: from `pack`: the one or two directions of each layer, one layer after the other.
        layers: the number of layers.
        sizes: int64, the size of the batch at each step, for packed sequences.

    Returns:
        the outputs of all steps, and the last state or states.
    """
    hidden = state[0].shape[-1]
    data = (x,) if sizes is None else (x, sizes)
    batch_first = (False,) if sizes is None else ()
    ways = len(packed) // layers
    options = (list(packed), True, layers, 0.0, False, ways > 1, *batch_first)
    ends = state[0].new_tensor(ENDS).expand(*state[0].shape[:-1], -1)
    first = [torch.cat(pair, -1) for pair in zip(state, (ends, ends * SATURATED), strict=False)]
    if kind == "lstm":
        out, *last = torch.quantized_lstm(*data, tuple(first), *options, use_dynamic=True)
    else:
        out, *last = torch.quantized_gru(*data, first[0], *options)
    own = out.unflatten(-1, (ways, -1))[..., :hidden].flatten(-2)
    return own.contiguous(), *(one[..., :hidden].contiguous() for one in last)
