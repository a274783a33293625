"""Whether a model can be compressed, said before any work."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from pared.errors import ModelError
from pared.formats.coded import RAW_TYPES, dtype_name
from pared.model.tensors import Slot, find_tensors


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
