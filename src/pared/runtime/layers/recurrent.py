"""The forwards of LSTM, GRU and their cells on codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared.runtime.kernels import recurrent
from pared.runtime.kernels.recurrent import Kind, Weights
from pared.runtime.layers.dispatch import Owner, linear_product

_KINDS: dict[type[nn.Module], Kind] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.LSTMCell: "lstm", nn.GRUCell: "gru"}


def layer_weights(module: nn.RNNBase) -> tuple[str, ...]:
    """The weights of an LSTM or a GRU; none if states are projected, for which there is no kernel."""
    return () if module.proj_size else tuple(name for name in module._flat_weights_names if name.startswith("weight"))


def cell_weights(_module: nn.RNNCellBase) -> tuple[str, ...]:
    """The weights of a cell."""
    return ("weight_ih", "weight_hh")


def _kind(module: nn.Module) -> Kind:
    return next(kind for cls, kind in _KINDS.items() if isinstance(module, cls))


def _packed(module: Any, suffix: str) -> Any:
    owner = cast(Owner, module)
    names = [f"weight_{which}{suffix}" for which in ("ih", "hh")]

    def pack() -> Any:
        codes, steps = ([get(name) for name in names] for get in (owner.pared_codes, owner.pared_row_steps))
        biases = [module._parameters.get(name.replace("weight", "bias")) for name in names]
        return recurrent.pack(Weights((codes[0], codes[1]), (steps[0], steps[1]), (biases[0], biases[1])))

    return owner.pared_packed(suffix, pack)


def layer_forward(module: Any, input: Tensor | PackedSequence, hx: Any = None) -> Any:
    """The output of `nn.LSTM.forward` and `nn.GRU.forward`, or NotImplemented for a call that needs the float layer."""
    x = input
    if module.training and module.dropout:
        return NotImplemented
    if isinstance(x, PackedSequence):
        return _packed_sequence(module, x, hx)
    if x.dim() not in (2, 3) or not x.numel() or not x.is_floating_point():
        return NotImplemented
    batched, first = x.dim() == 3, module.batch_first and x.dim() == 3
    data = (x if batched else x[:, None]).float()
    data = data.transpose(0, 1) if first else data
    state = _states(module, hx, data, data.shape[1], batched)
    if state is NotImplemented or not _share_a_grid(data.abs().amax((0, 2))):
        return NotImplemented
    out, *last = recurrent.run(_kind(module), data, state, _all_packed(module), module.num_layers)
    out = out.transpose(0, 1) if first else out
    return _as_given(x.dtype, out if batched else out[:, 0], last if batched else [one[:, 0] for one in last])


def _packed_sequence(module: Any, x: PackedSequence, hx: Any) -> Any:
    data, sizes, order, back = x
    if not data.numel() or not data.is_floating_point():
        return NotImplemented
    state = _states(module, hx, data, int(sizes[0]), True)
    if state is NotImplemented or not _share_a_grid(_peaks(data, sizes)):
        return NotImplemented
    if order is not None and hx is not None:
        state = [one.index_select(1, order) for one in state]
    kind, packed = _kind(module), _all_packed(module)
    out, *last = recurrent.run(kind, data.float(), state, packed, module.num_layers, sizes)
    last = last if back is None else [one.index_select(1, back) for one in last]
    values, states = _as_given(data.dtype, out, last)
    return PackedSequence(values, sizes, order, back), states


# All samples of a batch share one grid: a sample more than 8 times quieter than the loudest would use too few levels.
_LOUDER: Final = 8.0


def _share_a_grid(peaks: Tensor) -> bool:
    """Whether a batch may share an int8 grid, given the largest magnitude in each sample's input.

    Inputs with NaN or Inf go to the float layer, whose outputs show them.
    """
    loud = peaks[peaks > 0]
    return bool(peaks.isfinite().all()) and (not len(loud) or bool(loud.max() <= _LOUDER * loud.min()))


def _peaks(data: Tensor, sizes: Tensor) -> Tensor:
    """The largest magnitude of each sequence of a packed batch."""
    first = sizes.cumsum(0) - sizes
    sample = torch.arange(len(data), device=data.device) - torch.repeat_interleave(first, sizes)
    return data.new_zeros(int(sizes[0])).scatter_reduce(0, sample, data.abs().amax(1), "amax")


def _all_packed(module: Any) -> list[Any]:
    names = [name for name in layer_weights(module) if name.startswith("weight_ih")]
    return [_packed(module, name.removeprefix("weight_ih")) for name in names]


def _states(module: Any, hx: Any, data: Tensor, batch: int, batched: bool) -> Any:
    """The first states in float32, (layers * directions, batch, hidden); NotImplemented if the float layer has to run.

    States that come from these layers lie within (-1, 1); a caller's own need not, and share a grid, too.
    """
    lstm = _kind(module) == "lstm"
    directions = 2 if module.bidirectional else 1
    shape = (module.num_layers * directions, batch, module.hidden_size)
    if data.shape[-1] != module.input_size:
        return NotImplemented
    if hx is None:
        return [torch.zeros(shape, device=data.device)] * (2 if lstm else 1)
    given: Sequence[Tensor] = hx if lstm else [hx]
    found = [(one if batched else one[:, None]).float().contiguous() for one in given]
    if len(found) != (2 if lstm else 1) or not all(one.shape == shape and one.sum().isfinite() for one in found):
        return NotImplemented
    return found if _share_a_grid(found[0].abs().amax((0, 2)).clamp(min=1.0)) else NotImplemented


def _as_given(dtype: torch.dtype, out: Tensor, last: Sequence[Tensor]) -> tuple[Tensor, Any]:
    states = [one.to(dtype) for one in last]
    return out.to(dtype), (states[0] if len(states) == 1 else tuple(states))


def cell_forward(module: Any, input: Tensor, hx: Any = None) -> Any:
    """The output of `nn.LSTMCell.forward` and `nn.GRUCell.forward`: a sequence of one step; or NotImplemented."""
    x = input
    batched = x.dim() == 2
    lstm = _kind(module) == "lstm"
    given = [] if hx is None else (list(hx) if lstm else [hx])
    if x.dim() not in (1, 2) or not x.numel() or not x.is_floating_point() or x.shape[-1] != module.input_size:
        return NotImplemented
    data = x if batched else x[None]
    zero = torch.zeros(len(data), module.hidden_size, device=x.device)
    state = [(one if batched else one[None]).float() for one in given] or [zero] * (2 if lstm else 1)
    if any(one.shape != zero.shape or not one.sum().isfinite() for one in state):
        return NotImplemented
    # States from these layers lie within (-1, 1); a caller's own need not.
    peaks = (data.float().abs().amax(1), state[0].abs().amax(1).clamp(min=1.0))
    if not all(map(_share_a_grid, peaks)):
        return NotImplemented
    sequence = [one[None].contiguous() for one in (data.float(), *state)]
    _, *last = recurrent.run(_kind(module), sequence[0], sequence[1:], [_packed(module, "")], 1)
    found = [(one[0] if batched else one[0, 0]).to(x.dtype) for one in last]
    return tuple(found) if lstm else found[0]


def plain_cell_forward(module: Any, input: Tensor, hx: Tensor | None = None) -> Any:
    """The output of `nn.RNNCell.forward`, or NotImplemented."""
    x = input
    hidden = x.new_zeros(*x.shape[:-1], module.hidden_size) if hx is None else hx
    if not x.is_floating_point() or x.dim() not in (1, 2) or hidden.shape != (*x.shape[:-1], module.hidden_size):
        return NotImplemented
    total = linear_product(module, "weight_ih", x, module.bias_ih) + linear_product(
        module, "weight_hh", hidden, module.bias_hh
    )
    return total.tanh() if module.nonlinearity == "tanh" else total.relu()
