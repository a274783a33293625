"""The forwards of LSTM, GRU and their cells on codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared.formats.activation import Range
from pared.runtime.kernels.activation import tell_far
from pared.runtime.kernels.fbgemm import recurrent
from pared.runtime.kernels.fbgemm.recurrent import Kind, Weights
from pared.runtime.kernels.onnxruntime.lstm import Lstm
from pared.runtime.kernels.onnxruntime.lstm import available as without_onnxruntime
from pared.runtime.layers.dispatch import Owner, linear_product

_KINDS: dict[type[nn.Module], Kind] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.LSTMCell: "lstm", nn.GRUCell: "gru"}


def layer_weights(module: nn.RNNBase) -> tuple[str, ...]:
    """The weights of an LSTM or a GRU; none if states are projected, for which there is no kernel."""
    return () if module.proj_size else tuple(name for name in module._flat_weights_names if name.startswith("weight"))


def cell_weights(_module: nn.RNNCellBase) -> tuple[str, ...]:
    """The weights of a cell."""
    return ("weight_ih", "weight_hh")


_FIRST: Final = ("", "_l0", "_l0_reverse")  # the ends of the names of weights that read the layer's own input


def _kind(module: nn.Module) -> Kind:
    return next(kind for cls, kind in _KINDS.items() if isinstance(module, cls))


def _weights(module: Any, suffix: str) -> Weights:
    owner = cast(Owner, module)
    names = [f"weight_{which}{suffix}" for which in ("ih", "hh")]
    codes, steps = ([get(name) for name in names] for get in (owner.pared_codes, owner.pared_row_steps))
    biases = [module._parameters.get(name.replace("weight", "bias")) for name in names]
    return Weights((codes[0], codes[1]), (steps[0], steps[1]), (biases[0], biases[1]))


def _packed(module: Any, suffix: str) -> Any:
    ways = 0 if suffix in _FIRST else 1 + module.bidirectional
    scale = _input_scale(module)
    return cast(Owner, module).pared_packed(suffix, lambda: recurrent.pack(_weights(module, suffix), ways, scale))


def _in_onnxruntime(module: nn.LSTM, span: Range) -> Lstm:
    def pack() -> Lstm:
        return Lstm([_weights(module, suffix) for suffix in _suffixes(module)], module.num_layers, span)

    found: Lstm = cast(Owner, module).pared_packed("onnxruntime", pack)
    return found


def _suffixes(module: nn.RNNBase) -> list[str]:
    return [name.removeprefix("weight_ih") for name in layer_weights(module) if name.startswith("weight_ih")]


def _input_scale(module: Any) -> float:
    owner = cast(Owner, module)

    def find() -> float:
        names = [name for suffix in _FIRST if (name := f"weight_ih{suffix}") in owner.pared_views]
        found = [owner.pared_codes(name).short().abs().amax(1) * owner.pared_row_steps(name) for name in names]
        return recurrent.input_scale(float(torch.cat(found).max()))

    scale: float = owner.pared_packed("scale of the input", find)
    return scale


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
    if state is NotImplemented:
        return NotImplemented
    out, last = _run(module, data, state, is_given=hx is not None)
    out = out.transpose(0, 1) if first else out
    return _as_given(x.dtype, out if batched else out[:, 0], last if batched else [one[:, 0] for one in last])


def _packed_sequence(module: Any, x: PackedSequence, hx: Any) -> Any:
    data, sizes, order, back = x
    if not data.numel() or not data.is_floating_point():
        return NotImplemented
    state = _states(module, hx, data, int(sizes[0]), True)
    if state is NotImplemented:
        return NotImplemented
    if order is not None and hx is not None:
        state = [one.index_select(1, order) for one in state]
    out, last = _run(module, data.float(), state, sizes, is_given=hx is not None)
    last = last if back is None else [one.index_select(1, back) for one in last]
    values, states = _as_given(data.dtype, out, last)
    return PackedSequence(values, sizes, order, back), states


# The grid of states reaches from -1 to 1: a sample whose states never reach an eighth of that would use too few levels.
_LEAST: Final = 1 / 8


def _run(
    module: Any, data: Tensor, state: list[Tensor], sizes: Tensor | None = None, *, is_given: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Run each sample of a batch on codes, or in floats if the grid of states does not suit it.

    That is so if its states are large (those that come from these layers lie within (-1, 1), a caller's own need not),
    if all of them are small, and if it holds NaN or Inf, which codes would hide.

    Args:
        module: the layer or cell.
        data: float32 (steps, batch, inputs), or with sizes those of a `PackedSequence`.
        state: the first states, float32 (layers * directions, batch, hidden).
        sizes: the size of the batch at each step.
        is_given: whether the first states are a caller's; else they are zeros.

    Returns:
        the outputs, and the last states.
    """
    suits = _suits(state) if is_given else torch.ones(state[0].shape[1], dtype=torch.bool, device=data.device)
    activation = cast(Owner, module).pared_activation
    assert activation is not None, "a module that runs on floats has no kernels"
    if activation.mode == "static" and sizes is None and len(data) > 1 and not without_onnxruntime():
        out, last, quiet = _in_range(module, activation.span, data, state, suits)
    else:
        suits &= _peaks(data, sizes).isfinite()
        if not suits.all():
            data_, state_ = data.nan_to_num(0.0, 0.0, 0.0), _tamed(state)
            out, last = _on_codes(module, data_, state_, sizes)
        else:
            out, last = _on_codes(module, data, state, sizes)
        quiet = _is_quiet(data, state, out, last, sizes)
    suits &= ~quiet
    if suits.all():
        return out, last
    exact, ends = _in_floats(module, data, state, sizes)
    of_rows = suits if sizes is None else suits[_samples(len(data), sizes)]
    out = torch.where(of_rows[:, None], out, exact)
    return out, [torch.where(suits[:, None], one, end) for one, end in zip(last, ends, strict=True)]


def _suits(state: list[Tensor]) -> Tensor:
    """Whether the first states of each sample are finite, and the hidden ones within -1..1."""
    suits = state[0].abs().amax((0, 2)) <= 1.0
    for one in state[1:]:
        suits &= one.sum((0, 2)).isfinite()
    return suits


def _tamed(state: list[Tensor]) -> list[Tensor]:
    """The same states where they suit."""
    hidden, *others = (one.nan_to_num(0.0, 0.0, 0.0) for one in state)
    return [hidden.clamp(-1.0, 1.0), *others]


def _in_range(
    module: Any, span: Range, data: Tensor, state: list[Tensor], suits: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The outputs and last states on the grid of a calibrated range, and whether each sample's states are small.

    Args:
        module: an LSTM.
        span: the range.
        data: as in `_run`.
        state: as in `_run`.
        suits: whether each sample's states suit; becomes false for samples with NaN or Inf in their input.
    """
    lstm = _in_onnxruntime(module, span)
    ran = lstm.run(data, state if suits.all() else _tamed(state))
    finite = ran.energies.isfinite()
    if finite.all():
        tell_far(float(ran.energies.sum()), data.numel(), max(-span.low, span.high))
    else:
        ran = lstm.run(data.nan_to_num(0.0, 0.0, 0.0), _tamed(state))
    suits &= finite
    return ran.out, ran.last, _are_small(ran.peaks, ran.last)


def _is_quiet(data: Tensor, state: list[Tensor], out: Tensor, last: list[Tensor], sizes: Tensor | None) -> Tensor:
    """Whether the states of each sample, of which a state of zeros is exact, are small throughout."""
    steps = len(data) if sizes is None else len(sizes)
    if steps > 1:
        return _are_small(_peaks(out, sizes), last)
    return _are_small(state[0].abs().amax((0, 2)), [])


def _are_small(peaks: Tensor, last: Sequence[Tensor]) -> Tensor:
    """Whether the states of each sample are small, from the peaks of the outputs and from the last states."""
    if last and len(last[0]) > 2:
        peaks = torch.minimum(peaks, last[0].abs().amax(2).amin(0))  # of the layers below, only these are known
    return (peaks > 0) & (peaks < _LEAST)


def _on_codes(module: Any, data: Tensor, state: list[Tensor], sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    packed, scale = _all_packed(module), _input_scale(module)
    data = data if scale == 1.0 else data * scale
    out, *last = recurrent.run(_kind(module), data, state, packed, getattr(module, "num_layers", 1), sizes)
    return out, last


def _in_floats(module: Any, data: Tensor, state: list[Tensor], sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The same with decoded weights."""
    names = getattr(module, "_flat_weights_names", None) or [*cell_weights(module), "bias_ih", "bias_hh"]
    weights = [
        module.pared_decode(name) if name in module.pared_views else module._parameters[name]
        for name in names
        if name in module.pared_views or module._parameters.get(name) is not None
    ]
    weights = [weight.detach().float() for weight in weights]
    layers, both = getattr(module, "num_layers", 1), getattr(module, "bidirectional", False)
    lstm = _kind(module) == "lstm"
    given = (data,) if sizes is None else (data, sizes)
    options = (weights, module.bias, layers, 0.0, False, both, *((False,) if sizes is None else ()))
    run: Any = torch.lstm if lstm else torch.gru
    out, *last = run(*given, tuple(state) if lstm else state[0], *options)
    return out, last


def _peaks(data: Tensor, sizes: Tensor | None) -> Tensor:
    """The largest magnitude of each sample of a batch; NaN if it holds NaN."""
    if sizes is None:
        return data.abs().amax((0, 2))
    peaks = data.new_zeros(int(sizes[0]))
    return peaks.scatter_reduce(0, _samples(len(data), sizes), data.abs().amax(1), "amax")


def _samples(rows: int, sizes: Tensor) -> Tensor:
    """Which sample each row of a packed batch belongs to."""
    first = sizes.cumsum(0) - sizes
    return torch.arange(rows, device="cpu") - torch.repeat_interleave(first, sizes)


def _all_packed(module: Any) -> list[Any]:
    if isinstance(module, nn.RNNCellBase):
        return [_packed(module, "")]
    return [_packed(module, suffix) for suffix in _suffixes(module)]


def _states(module: Any, hx: Any, data: Tensor, batch: int, batched: bool) -> Any:
    """The first states in float32, (layers * directions, batch, hidden); NotImplemented if they are misshapen."""
    lstm = _kind(module) == "lstm"
    directions = 2 if module.bidirectional else 1
    shape = (module.num_layers * directions, batch, module.hidden_size)
    if data.shape[-1] != module.input_size:
        return NotImplemented
    if hx is None:
        return [torch.zeros(shape, dtype=torch.float32, device=data.device)] * (2 if lstm else 1)
    given: Sequence[Tensor] = hx if lstm else [hx]
    found = [(one if batched else one[:, None]).float().contiguous() for one in given]
    if len(found) != (2 if lstm else 1) or not all(one.shape == shape for one in found):
        return NotImplemented
    return found


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
    zero = torch.zeros(len(data), module.hidden_size, dtype=torch.float32, device=x.device)
    state = [(one if batched else one[None]).float() for one in given] or [zero] * (2 if lstm else 1)
    if any(one.shape != zero.shape for one in state):
        return NotImplemented
    first, *states = (one[None].contiguous() for one in (data.float(), *state))
    _, last = _run(module, first, states)
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
