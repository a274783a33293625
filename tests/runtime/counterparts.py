"""Every kind of layer that can run in int8, every way to be called: in floats, and as its counterpart."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from pared.fitting.rounding.nearest import nearest
from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.formats.views import view_of
from pared.runtime.layers.counterpart import stand_in
from pared.runtime.layers.table import layer_of, weights_of


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


class Halves(nn.Linear):
    """Uses its weight in two products and in an operation that no kernel knows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.weight.t().abs().mean(1, keepdim=True)


class SamePadded(nn.Conv2d):
    """Pads its input itself, unevenly, as TensorFlow does and EfficientNet with it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 1, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


def sequences() -> PackedSequence:
    """Of lengths 5, 7 and 2, in this order."""
    return nn.utils.rnn.pack_sequence([image(5, 12), image(7, 12), image(2, 12)], enforce_sorted=False)


def masked() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return image(2, 6, 16), padding


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(33, 17), (image(5, 33),), {}),
    "linear in 4 dimensions": (lambda: nn.Linear(16, 8), (image(2, 3, 4, 16),), {}),
    "linear without bias, one row": (lambda: nn.Linear(24, 3, bias=False), (image(24),), {}),
    "linear subclass": (lambda: Halves(16, 8), (image(5, 16),), {}),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2), (image(2, 6, 21),), {}),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 10, 3), (image(6, 9),), {}),
    "conv1d same, even taps": (lambda: nn.Conv1d(4, 4, 4, padding="same"), (image(2, 4, 11),), {}),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (image(2, 3, 9, 11),), {}),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (image(1, 8, 7, 7),), {}),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (image(2, 16, 8, 8),), {}),
    "conv2d dilated, valid": (lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="valid"), (image(1, 4, 9, 9),), {}),
    "conv2d reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (image(2, 4, 6, 6),), {}),
    "conv2d channels last": (
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        (image(2, 8, 6, 6).to(memory_format=torch.channels_last),),
        {},
    ),
    "conv2d subclass": (lambda: SamePadded(3, 8, 4, stride=2), (image(2, 3, 12, 12),), {}),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1)), (image(1, 2, 3, 5, 5),), {}),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(6, 4, 5, stride=2, padding=1), (image(2, 6, 9),), {}),
    "transposed conv1d unbatched": (lambda: nn.ConvTranspose1d(6, 4, 4, bias=False), (image(6, 9),), {}),
    "transposed conv2d": (
        lambda: nn.ConvTranspose2d(8, 3, (4, 3), stride=(2, 3), padding=(1, 0), output_padding=1, dilation=(1, 2)),
        (image(2, 8, 5, 4),),
        {},
    ),
    "embedding": (lambda: nn.Embedding(50, 12, padding_idx=3), (torch.tensor([[1, 3, 49], [0, 3, 7]]),), {}),
    "embedding subclass": (lambda: Scaled(50, 12), (torch.tensor([5, 6]),), {}),
    "bags": (lambda: nn.EmbeddingBag(50, 12), (ids(3, 5),), {}),
    "bags with offsets": (
        lambda: nn.EmbeddingBag(50, 12, mode="max", padding_idx=-50),
        (torch.tensor([0, 4, 0, 9]), torch.tensor([0, 2, 2])),
        {},
    ),
    "weighted bags": (
        lambda: nn.EmbeddingBag(50, 12, mode="sum", include_last_offset=True),
        (ids(5), torch.tensor([0, 3, 5]), image(5)),
        {},
    ),
    "lstm": (lambda: nn.LSTM(12, 16, 2, bidirectional=True), (image(7, 3, 12),), {}),
    "lstm, batch first, with states": (
        lambda: nn.LSTM(12, 16, batch_first=True),
        (image(3, 7, 12), (image(1, 3, 16).tanh(), image(1, 3, 16))),
        {},
    ),
    "lstm, no batch, no bias": (lambda: nn.LSTM(12, 16, bias=False), (image(7, 12),), {}),
    "lstm, packed": (lambda: nn.LSTM(12, 16, bidirectional=True), (sequences(),), {}),
    "lstm, packed, with states": (
        lambda: nn.LSTM(12, 16),
        (sequences(), (image(1, 3, 16).tanh(), image(1, 3, 16))),
        {},
    ),
    "gru": (lambda: nn.GRU(12, 16, 2, bidirectional=True, batch_first=True), (image(3, 7, 12),), {}),
    "gru, packed, with a state": (lambda: nn.GRU(12, 16), (sequences(), image(1, 3, 16).tanh()), {}),
    "lstm cell": (lambda: nn.LSTMCell(12, 16), (image(3, 12),), {}),
    "lstm cell with states, no batch": (lambda: nn.LSTMCell(12, 16), (image(12), (image(16).tanh(), image(16))), {}),
    "gru cell": (lambda: nn.GRUCell(12, 16), (image(3, 12), image(3, 16).tanh()), {}),
    "rnn cell": (lambda: nn.RNNCell(12, 16, nonlinearity="relu"), (image(3, 12),), {}),
    "attention": (lambda: nn.MultiheadAttention(16, 4), (image(6, 2, 16), image(6, 2, 16), image(6, 2, 16)), {}),
    "self attention, masked": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (*[masked()[0]] * 3,),
        {"key_padding_mask": masked()[1], "need_weights": False},
    ),
    "cross attention": (
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12, bias=False, batch_first=True),
        (image(2, 5, 16), image(2, 7, 8), image(2, 7, 12)),
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(2), "average_attn_weights": False},
    ),
    "cross attention, one mask a head": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (image(2, 5, 16), image(2, 7, 16), image(2, 7, 16)),
        {"attn_mask": image(8, 5, 7)},
    ),
}


def build(name: str, mode: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The layer with the weights that the codes stand for, its counterpart, and what to call them with."""
    torch.manual_seed(0)
    make, args, kwargs = CASES[name]
    module = make().eval().requires_grad_(False)
    first = args[0].data
    low, high = (min(0.0, float(first.min())), float(first.max())) if mode == "static" else (0.0, 0.0)
    return module, counterpart_of(module, mode, low, high), args, kwargs


def counterpart_of(module: nn.Module, mode: str, low: float = 0.0, high: float = 0.0) -> nn.Module:
    """In int8; the module gets the weights that the codes stand for."""
    layer = layer_of(module)
    assert layer is not None
    held = [(module, weights_of(module))] + [(module.get_submodule(part), ("weight",)) for part in layer.children]
    coded = {(one, a): quantize(one, a) for one, attributes in held for a in attributes}
    counterpart = copy.deepcopy(module)
    stand_in(counterpart, {a: coded[module, a] for a in held[0][1]}, Activation(mode, low, high, held[0][1]))
    for part in layer.children:
        whole = {"weight": coded[module.get_submodule(part), "weight"]}
        stand_in(counterpart.get_submodule(part), whole, Activation("dynamic"))
    return counterpart


def quantize(module: nn.Module, attribute: str) -> Coded:
    """A weight in codes; the module gets what they stand for."""
    weight = module.get_parameter(attribute)
    coded = nearest(weight, 8, view_of(module, attribute, tuple(weight.shape)))
    weight.data.copy_(coded.decode())
    return coded


def modes(name: str) -> tuple[str, ...]:
    layer = layer_of(CASES[name][0]())
    assert layer is not None
    return layer.modes


def tensors(out: Any) -> list[Tensor]:
    """Its floats; of packed sequences too."""
    found = [one.data for one in tree_leaves(out) if isinstance(one, (Tensor, PackedSequence))]
    return [one for one in found if one.is_floating_point()]


EVERY = [(name, mode) for name in CASES for mode in modes(name)]

RECURRENT = [name for name in CASES if name.startswith(("lstm", "gru", "rnn"))]
