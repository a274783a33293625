"""The table of layers that can run on codes. `pared.register` adds to it."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from pared.runtime.kernels import recurrent
from pared.runtime.layers.attention import attention_forward, attention_weights
from pared.runtime.layers.recurrent import cell_forward, cell_weights, layer_forward, layer_weights, plain_cell_forward
from pared.runtime.layers.registry import LAYERS, Layer

__all__ = ["LAYERS"]

_BOTH: Final = ("static", "dynamic")


def _one(_module: nn.Module) -> tuple[str, ...]:
    return ("weight",)


def _table(module: Any) -> tuple[str, ...]:
    """Unless it edits the table while reading it."""
    return ("weight",) if module.max_norm is None else ()


def _transposed(module: Any) -> tuple[str, ...]:
    """One group, and no output beyond the last patch: folding has no place for it."""
    plain = module.groups == 1 and all(o < s for o, s in zip(module.output_padding, module.stride, strict=True))
    return ("weight",) if plain else ()


_CELL: Final = Layer(cell_weights, ("dynamic",), cell_forward, recurrent.available)
_RECURRENT: Final = Layer(layer_weights, ("dynamic",), layer_forward, recurrent.available)

LAYERS.update(
    {
        nn.Linear: Layer(_one, _BOTH, columns=True),
        nn.Conv1d: Layer(_one, _BOTH),
        nn.Conv2d: Layer(_one, _BOTH),
        nn.Conv3d: Layer(_one, _BOTH),
        nn.ConvTranspose1d: Layer(_transposed, _BOTH),
        nn.ConvTranspose2d: Layer(_transposed, _BOTH),
        nn.Embedding: Layer(_table, ("gather",)),
        nn.EmbeddingBag: Layer(_table, ("gather",)),
        nn.LSTM: _RECURRENT,
        nn.GRU: _RECURRENT,
        nn.LSTMCell: _CELL,
        nn.GRUCell: _CELL,
        nn.RNNCell: Layer(cell_weights, ("dynamic",), plain_cell_forward),
        nn.MultiheadAttention: Layer(attention_weights, ("dynamic",), attention_forward, children=("out_proj",)),
    }
)
