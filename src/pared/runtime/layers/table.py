"""The table of layers that can run on codes, and `pared.register`, which adds layers of your own to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from pared.errors import ConfigError
from pared.formats.views import OWN_ROWS
from pared.model.tensors import registered
from pared.runtime.kernels.fbgemm import recurrent
from pared.runtime.layers.attention import attention_forward, attention_weights
from pared.runtime.layers.recurrent import cell_forward, cell_weights, layer_forward, layer_weights, plain_cell_forward
from pared.runtime.layers.registry import LAYERS, Layer, has_columns, layer_of, weights_of
from pared.scalars import plain

# Who looks layers up imports from here, where the table has been filled, and not from `registry`.
__all__ = ["LAYERS", "Layer", "check_registered", "has_columns", "layer_of", "register", "weights_of"]

log = logging.getLogger(__name__)

_BOTH: Final = ("static", "dynamic")


@dataclass(frozen=True)
class _Named:
    """The same attributes for every module of a type."""

    names: tuple[str, ...]

    def __call__(self, _module: nn.Module) -> tuple[str, ...]:
        return self.names


def _lookup_weights(module: Any) -> tuple[str, ...]:
    """The table, unless the module rescales its rows while it reads them."""
    return ("weight",) if module.max_norm is None else ()


def _transposed_weights(module: Any) -> tuple[str, ...]:
    """The weight of a single group, without outputs beyond the last patch, for which folding has no place."""
    inside = all(o < s for o, s in zip(module.output_padding, module.stride, strict=True))
    return ("weight",) if module.groups == 1 and inside else ()


_WEIGHT: Final = _Named(("weight",))
_CELL: Final = Layer(cell_weights, ("dynamic",), cell_forward, recurrent.available)
_RECURRENT: Final = Layer(layer_weights, ("dynamic",), layer_forward, recurrent.available)

LAYERS.update(
    {
        nn.Linear: Layer(_WEIGHT, _BOTH, columns=True),
        nn.Conv1d: Layer(_WEIGHT, _BOTH),
        nn.Conv2d: Layer(_WEIGHT, _BOTH),
        nn.Conv3d: Layer(_WEIGHT, _BOTH),
        nn.ConvTranspose1d: Layer(_transposed_weights, _BOTH),
        nn.ConvTranspose2d: Layer(_transposed_weights, _BOTH),
        nn.Embedding: Layer(_lookup_weights, ("gather",)),
        nn.EmbeddingBag: Layer(_lookup_weights, ("gather",)),
        nn.LSTM: replace(_RECURRENT, modes=_BOTH),
        nn.GRU: _RECURRENT,
        nn.LSTMCell: _CELL,
        nn.GRUCell: _CELL,
        nn.RNNCell: Layer(cell_weights, ("dynamic",), plain_cell_forward),
        nn.MultiheadAttention: Layer(attention_weights, ("dynamic",), attention_forward, children=("out_proj",)),
    }
)
_BUILT_IN: Final = dict(LAYERS)  # before anything is registered


def register(
    layer: type[nn.Module],
    *,
    rows: Mapping[str, int | Sequence[int]] | None = None,
    int8: Sequence[str] = (),
    forward: Callable[..., Any] | None = None,
) -> None:
    """Describe a layer of your own: how its weights are laid out, and which of them can stay in codes while it runs.

    A layer need not be registered to be compressed: every weight is put on a grid with dimension 0 as its rows, and
    error feedback works with whatever function uses the weight. A registration holds for the whole process and for
    subclasses of the layer; a process that loads the artifact must make it again. A second registration of a layer
    replaces the first, with a warning in the log if they differ; models that were compressed before keep theirs.

    Args:
        layer: a subclass of `torch.nn.Module`.
        rows: by attribute, the dimension (or dimensions) of the weight that count its outputs: each row gets its own
            step. Default: dimension 0.
        int8: the attributes that run in int8 where that is measured to be faster and accurate enough: those that are
            passed to `F.linear`, a convolution or `F.embedding` as the weight. Any other function sees floats.
        forward: runs instead of the layer's own when it is in int8, as `forward(layer, *args, **kwargs)`; for instance
            to multiply by one weight after the other where the float layer multiplies the weights first. Default: the
            layer's own.

    Raises:
        ConfigError: `layer` is not a module class, an attribute is not a name, or a dimension is not a whole number
            from 0 up. `fit` checks that the layer has these attributes and dimensions.

    >>> class Scaled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Parameter(torch.randn(16, 8))  # (inputs, outputs)
    ...     def forward(self, x):
    ...         return 2 * torch.nn.functional.linear(x, self.table.t())
    >>> register(Scaled, rows={"table": 1})
    """
    where = f"pared.register({getattr(layer, '__name__', layer)!s})"
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)) or layer is nn.Module:
        raise ConfigError("is not a class of modules", where=where, remedy="Pass a subclass of torch.nn.Module.")
    if not (rows is None or isinstance(rows, Mapping)) or not _are_names(int8) or not _are_names(tuple(rows or ())):
        raise ConfigError(
            "rows and int8 must name each attribute once, by a string",
            where=where,
            remedy='Pass a dict such as rows={"weight": 1}, and a list such as int8=["weight"].',
        )
    if forward is not None and (not int8 or not callable(forward)):
        raise ConfigError(
            "forward must be a function, and only runs for a layer with weights in int8",
            where=where,
            remedy='Pass a function, and name the weights: int8=["weight"].',
        )
    before = OWN_ROWS.get(layer), LAYERS.get(layer)
    OWN_ROWS[layer] = {attribute: _dimensions(value, where) for attribute, value in (rows or {}).items()}
    weights = tuple(int8)
    if weights:
        modes = ("static", "dynamic") if len(weights) == 1 and forward is None else ("dynamic",)
        LAYERS[layer] = Layer(_Named(weights), modes, forward)
    else:
        LAYERS.pop(layer, None)
        if layer in _BUILT_IN:
            LAYERS[layer] = _BUILT_IN[layer]
    after = OWN_ROWS[layer], LAYERS.get(layer)
    if any(old not in (None, new) for old, new in zip(before, after, strict=True)):
        log.warning("%s replaces what was known of this layer; models that were compressed before keep that", where)


def check_registered(model: nn.Module) -> None:
    """Check that the layers of a model have what was registered for them.

    Raises:
        ConfigError: a layer lacks a registered attribute, or a weight a registered dimension.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            named = LAYERS[cls].weights(module) if LAYERS.get(cls) is not _BUILT_IN.get(cls) else ()
            rows = OWN_ROWS.get(cls, {})
            for attribute in (*named, *rows):
                _check_attribute(name or type(module).__name__, module, attribute, rows.get(attribute, ()), cls)


def _check_attribute(name: str, module: nn.Module, attribute: str, rows: tuple[int, ...], cls: type[nn.Module]) -> None:
    where = f"pared.register({cls.__name__})"
    if attribute not in module._parameters and attribute not in module._buffers and not hasattr(module, attribute):
        raise ConfigError(
            f"{name} has no weight {attribute!r}",
            where=where,
            remedy=f"Its weights are: {', '.join(key for key, _ in registered(module)) or 'none'}.",
        )
    tensor = getattr(module, attribute, None)
    if isinstance(tensor, Tensor) and any(one >= tensor.dim() for one in rows):
        raise ConfigError(
            f"rows={rows} do not fit {name}.{attribute}, which has {tensor.dim()} dimensions",
            where=where,
            remedy="Count dimensions from 0, which is the default.",
        )


def _are_names(names: object) -> bool:
    if not isinstance(names, (list, tuple)):
        return False
    return len(set(map(repr, names))) == len(names) and all(isinstance(n, str) and n.isidentifier() for n in names)


def _dimensions(value: int | Sequence[int], where: str) -> tuple[int, ...]:
    found = tuple(map(plain, value)) if isinstance(value, (list, tuple)) else (plain(value),)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise ConfigError(
            f"rows={value!r} must be dimensions: whole numbers from 0 up",
            where=where,
            remedy="Count dimensions from 0, which is the default.",
        )
    return tuple(sorted({one for one in found if isinstance(one, int)}))
