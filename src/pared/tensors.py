"""Which tensors a model has: every parameter and buffer once, with all the names it goes by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import ModelError
from pared.formats import RAW_TYPES, dtype_name

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model.

    Args:
        names: every dotted name it goes by; more than one where it is tied.
        objects: the model's own tensor; several objects where distinct parameters share one storage.
        kind: whether it is registered as a parameter or as a buffer.
        persistent: whether it is in the model's `state_dict`.
        module: the module that owns its first name.
    """

    names: tuple[str, ...]
    objects: tuple[Tensor, ...]
    kind: Literal["parameter", "buffer"]
    persistent: bool
    module: nn.Module

    @property
    def name(self) -> str:
        """The first name: the tensor's name in plans, tables and files."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The numbers."""
        return self.objects[0]

    @property
    def attribute(self) -> str:
        """The tensor's name within the module that owns it."""
        return self.name.rpartition(".")[2]

    @property
    def weight_like(self) -> bool:
        """A floating tensor of two or more dimensions that the model's own state holds: it belongs on a grid."""
        return self.persistent and self.tensor.dim() >= 2 and self.tensor.dtype in GRID_SOURCES

    @property
    def fits_grid(self) -> bool:
        """Weight-like, or a parameter of one dimension: a bias, a norm's scale."""
        flat = self.kind == "parameter" and self.tensor.dim() == 1 and self.tensor.dtype in GRID_SOURCES
        return self.tensor.numel() > 0 and (self.weight_like or flat)


# float64 is kept exactly: whoever chose it needs more than a grid gives.
GRID_SOURCES = (torch.float32, torch.float16, torch.bfloat16)


def find_tensors(model: nn.Module) -> tuple[Slot, ...]:
    """Every parameter and buffer of the model once, in the model's order.

    Two names share a slot if they are one tensor: the same object, or the same place in memory with the same
    shape, strides and type.

    >>> a = nn.Linear(2, 2, bias=False)
    >>> [slot.names for slot in find_tensors(nn.ModuleDict({"x": a, "y": a}))]
    [('x.weight', 'y.weight')]
    """
    found: dict[object, Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor, kind, persistent in _registered(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            key = _identity(tensor)
            known = found.get(key)
            if known is None:
                found[key] = Slot((name,), (tensor,), kind, persistent, module)
            else:
                others = () if any(tensor is one for one in known.objects) else (tensor,)
                found[key] = replace(
                    known,
                    names=(*known.names, name),
                    objects=known.objects + others,
                    persistent=known.persistent or persistent,
                )
    return tuple(found.values())


def _registered(module: nn.Module) -> Iterator[tuple[str, Tensor, Literal["parameter", "buffer"], bool]]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, "parameter", True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer, "buffer", attribute not in module._non_persistent_buffers_set


def _identity(tensor: Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by attribute, those of its children left out."""
    for attribute, tensor, _, _ in _registered(module):
        yield attribute, tensor


def loose_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that stand in a module as plain attributes: in no state dict, but part of the model all the same."""
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                yield module, attribute, value


def held_elsewhere(model: nn.Module) -> set[int]:
    """The identities of tensors that modules also hold in attributes of their own: in lists, dicts or by themselves."""
    registries = ("_parameters", "_buffers", "_modules", "_flat_weights")  # the last is an LSTM's, which is renewed
    return {
        id(leaf)
        for module in model.modules()
        for attribute, value in vars(module).items()
        if attribute not in registries
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    }


def clone_structure(model: ModuleT, new_tensor: Callable[[Tensor], Tensor] | Mapping[int, Tensor]) -> ModuleT:
    """A deep copy of the model whose parameters and buffers are not copied but replaced.

    Args:
        model: left as it is.
        new_tensor: called with each registered tensor, gives the one that takes its place; or a mapping from `id`.
    """
    memo: dict[int, object] = {}
    for _, attribute, loose in loose_tensors(model):
        if loose.grad_fn is not None:  # weight_norm's `weight`: recomputed by its hook, and deepcopy would refuse it
            memo[id(loose)] = loose.detach().clone()
        del attribute
    for module in model.modules():
        for _, tensor, kind, _ in _registered(module):
            if id(tensor) in memo:
                continue
            new = new_tensor[id(tensor)] if isinstance(new_tensor, Mapping) else new_tensor(tensor)
            if kind == "parameter" and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            memo[id(tensor)] = new
    clone: ModuleT = copy.deepcopy(model, memo)
    refresh_recurrent(clone)
    return clone


def refresh_recurrent(model: nn.Module) -> None:
    """Let every LSTM and GRU look at its present weights: they keep weak references that copying leaves stale."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and all(name in module._parameters for name in module._flat_weights_names):
            module._init_flat_weights()


def check_supported(model: object) -> None:
    """Refuse what cannot be compressed, before any work is done.

    Raises:
        ModelError: not a module; compiled, scripted or lazy; on the meta device; already quantized by others;
            or a parameter that is NaN or infinite.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            remedy="Pass the model itself, not its weights.",
        )
    check_unquantized(model)
    check_modules(model)
    for slot in find_tensors(model):
        _check_tensor(slot)


def check_unquantized(model: nn.Module) -> None:
    """Refuse a model that is quantized already, or holds one that is.

    Raises:
        ModelError: it is.
    """
    for name, module in model.named_modules():
        if "_pared" in vars(module) or "pared_views" in vars(module):
            raise ModelError(
                "is quantized already",
                where=name or type(module).__name__,
                remedy="Pass the float model, or an empty one of its class.",
            )


def check_modules(model: nn.Module) -> None:
    """Refuse modules whose weights cannot be got at.

    Raises:
        ModelError: compiled, scripted or lazy; prepared for quantization or quantized by others.
    """
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)


_LAZY: Final = (nn.UninitializedParameter, nn.UninitializedBuffer)
# Where PyTorch's own quantization has its modules.
_QUANTIZED: Final = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
)


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError("is a TorchScript module", where=name, remedy="Pass the model as it was before torch.jit.")
    if hasattr(module, "_orig_mod"):
        raise ModelError(
            "is compiled",
            where=name,
            remedy="Pass the model as it was before torch.compile (its `_orig_mod`).",
        )
    if any(isinstance(one, _LAZY) for one in (*module._parameters.values(), *module._buffers.values())):
        raise ModelError("has lazy parameters", where=name, remedy="Run the model once on real inputs before `fit`.")
    if type(module).__module__.startswith(_QUANTIZED):
        raise ModelError(
            f"is already quantized, or prepared for it ({type(module).__module__})",
            where=name,
            remedy="Pass the float model instead.",
        )


def _check_tensor(slot: Slot) -> None:
    tensor = slot.tensor
    if tensor.is_meta:
        raise ModelError(
            "is on the meta device: it holds no numbers", where=slot.name, remedy="Load the weights first."
        )
    if tensor.layout is not torch.strided or dtype_name(tensor.dtype) not in RAW_TYPES:
        raise ModelError(
            f"is a tensor that no format holds ({tensor.dtype}, {tensor.layout})",
            where=slot.name,
            remedy="Make it dense, of a type such as float32, float16, bfloat16, int64 or bool.",
        )
    if tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ModelError(
            f"is a {type(tensor).__name__}, a tensor that another tool made",
            where=slot.name,
            remedy="Pass the float model instead.",
        )
    if slot.kind == "parameter" and tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            wrong = torch.nonzero(~torch.isfinite(tensor.detach()))
            value = "NaN" if bool(torch.isnan(tensor.detach()).any()) else "Inf"
            raise ModelError(
                f"holds {value} ({len(wrong)} of {tensor.numel()} values, the first at {wrong[0].tolist()})",
                where=slot.name,
                remedy="Repair or reload the weights: no compressed model can be better than its source.",
            )
