"""The table of layers that can run on codes, and `pared.register`, which adds layers of your own to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from pared.errors import ConfigError
from pared.formats.views import OWN_ROWS
from pared.model.tensors import registered
from pared.runtime.kernels import recurrent
from pared.runtime.layers.attention import attention_forward, attention_weights
from pared.runtime.layers.recurrent import cell_forward, cell_weights, layer_forward, layer_weights, plain_cell_forward
from pared.runtime.layers.registry import LAYERS, Layer
from pared.scalars import plain

__all__ = ["LAYERS", "check_registered", "register"]

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


_BUILT_IN: Final = dict(LAYERS)  # before anything is registered


def register(
    layer: type[nn.Module],
    *,
    rows: Mapping[str, int | Sequence[int]] | None = None,
    int8: Sequence[str] = (),
    forward: Callable[..., Any] | None = None,
) -> None:
    """Tell how the weights of a layer are laid out, and which of them can stay in codes while it runs.

    Nothing needs to be registered for a layer to be compressed: every weight is put on a grid with dimension 0 as its
    rows, and error feedback works on whatever function uses it. What is registered holds for subclasses, too, and must
    be registered again in a process that loads the artifact.

    Args:
        layer: a subclass of `torch.nn.Module`.
        rows: by attribute, the dimension (or dimensions) of a weight that counts its outputs: each row gets a step of
            its own. Default: dimension 0.
        int8: attributes that run in int8 where that is measured to be faster and accurate enough: those that reach
            `F.linear`, a convolution or `F.embedding` as the weight. Whatever else is done with them sees floats.
        forward: runs instead of the layer's own when it is in int8, as `forward(layer, *args, **kwargs)`; for instance
            to make one product after the other where the float layer multiplies the weights first. Default: the
            layer's own.

    Raises:
        ConfigError: the layer is no module type, an attribute is no name, or a dimension no number from 0 up. That a
            layer has these attributes and dimensions is checked by `fit`.

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
        raise ConfigError("is no type of module", where=where, remedy="Pass a subclass of torch.nn.Module.")
    if not (rows is None or isinstance(rows, Mapping)) or not _are_names(int8) or not _are_names(tuple(rows or ())):
        raise ConfigError(
            "the attributes are not distinct names",
            where=where,
            remedy='Pass a dict such as rows={"weight": 1}, and a list such as int8=["weight"].',
        )
    if forward is not None and (not int8 or not callable(forward)):
        raise ConfigError(
            "a forward needs weights to run on", where=where, remedy='Pass a function, and int8=["weight"], too.'
        )
    OWN_ROWS[layer] = {attribute: _dimensions(value, where) for attribute, value in (rows or {}).items()}
    if int8:
        weights = tuple(int8)
        modes = ("static", "dynamic") if len(weights) == 1 and forward is None else ("dynamic",)
        LAYERS[layer] = Layer(lambda _module: weights, modes, forward)
    else:
        LAYERS.pop(layer, None)
        if layer in _BUILT_IN:
            LAYERS[layer] = _BUILT_IN[layer]


def check_registered(model: nn.Module) -> None:
    """Hold what was registered against the layers of a model.

    Raises:
        ConfigError: a layer has no such attribute, or a weight no such dimension.
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
            f"rows={rows} are no dimensions of {name}.{attribute}, which has {tensor.dim()}",
            where=where,
            remedy="Pass numbers from 0 up; dimension 0 is the default.",
        )


def _are_names(names: object) -> bool:
    if not isinstance(names, (list, tuple)):
        return False
    return len(set(map(repr, names))) == len(names) and all(isinstance(n, str) and n.isidentifier() for n in names)


def _dimensions(value: int | Sequence[int], where: str) -> tuple[int, ...]:
    found = tuple(map(plain, value)) if isinstance(value, (list, tuple)) else (plain(value),)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise ConfigError(
            f"rows={value!r} are no dimensions",
            where=where,
            remedy="Pass numbers from 0 up; dimension 0 is the default.",
        )
    return tuple(sorted({one for one in found if isinstance(one, int)}))
