"""Refuses models that cannot be compressed, before any work is done."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import ModelError
from pared.formats.coded import RAW_TYPES, dtype_name
from pared.model.state import extra
from pared.model.tensors import ModelTensor, ModelTensors, ModuleT, find_tensors, registered


def supported_tensors(model: ModuleT) -> ModelTensors[ModuleT]:
    """The tensors of a model, which can be compressed.

    Raises:
        ModelError: it is not a module; compiled, scripted or lazy; on the meta device; quantized already; or one of its
            parameters holds NaN or infinity; or its extra state is more than plain data; or it has neither that nor a
            number in its parameters and buffers.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            remedy="Pass an instance of the model, not its class, its weights or its name.",
        )
    check_nesting(model)
    check_unquantized(model)
    check_modules(model)
    tensors = find_tensors(model)
    for tensor in tensors:
        _check_tensor(tensor)
    states = extra.collect(model)
    if not tensors.numbers and not states:
        raise ModelError(
            f"has no numbers to compress: its {len(tensors)} parameters and buffers are empty",
            where=type(model).__name__,
            remedy="Pass the model that holds the weights; tensors in plain attributes do not count.",
        )
    return tensors


def check_nesting(model: nn.Module) -> None:
    """Refuse modules that nest deeper than Python calls functions within functions, as torch does to walk through them.

    Raises:
        ModelError: they do.
    """
    deepest, seen = 0, set[int]()
    waiting: list[tuple[Any, int]] = [(model, 1)]
    while waiting:
        module, depth = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            deepest = max(deepest, depth)
            waiting += [(child, depth + 1) for child in reversed(vars(module).get("_modules", {}).values())]
    most = sys.getrecursionlimit()
    if deepest > most - _OTHER_CALLS:
        raise ModelError(
            f"its modules nest {deepest:,} deep, and Python calls functions within functions at most {most:,} deep",
            where=type(model).__name__,
            remedy="Put the layers into one nn.Sequential, one after the other, or raise sys.setrecursionlimit.",
        )


def check_unquantized(model: nn.Module) -> None:
    """Refuse a model that pared has quantized, or that contains such a model.

    Raises:
        ModelError: it is quantized already.
    """
    for name, module in model.named_modules():
        if "_pared" in vars(module) or "pared_views" in vars(module):
            raise ModelError(
                "is already quantized by pared",
                where=name or type(module).__name__,
                remedy="Pass the float model, or an empty one of its class.",
            )


def check_modules(model: nn.Module) -> None:
    """Refuse modules whose weights are hidden or not there yet, and tensors that are not dense.

    Raises:
        ModelError: a tensor is sparse or nested; a module is compiled, scripted or lazy; prepared for quantization, or
            quantized by another tool.
    """
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
        for attribute, tensor in registered(module):
            _check_layout(f"{name}.{attribute}".removeprefix("."), tensor)


_OTHER_CALLS: Final = 250  # within which, or in which, a model is walked through

_LAZY: Final = (nn.UninitializedParameter, nn.UninitializedBuffer)

# Modules of PyTorch's own quantization.
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
    if any(isinstance(tensor, _LAZY) for tensor in (*module._parameters.values(), *module._buffers.values())):
        raise ModelError(
            "has lazy parameters, which have no shape yet",
            where=name,
            remedy="Call the model once on real inputs first.",
        )
    if type(module).__module__.startswith(_QUANTIZED):
        raise ModelError(
            f"is already quantized, or prepared for it ({type(module).__module__})",
            where=name,
            remedy="Pass the float model instead.",
        )


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise _no_format(name, tensor, "nested" if tensor.is_nested else str(tensor.layout))


def _no_format(name: str, tensor: Tensor, layout: str) -> ModelError:
    return ModelError(
        f"has a type or layout that no format can hold ({tensor.dtype}, {layout})",
        where=name,
        remedy="Convert it to a dense tensor of a type such as float32, float16, bfloat16, int64 or bool.",
    )


def _check_tensor(named: ModelTensor) -> None:
    tensor = named.tensor
    if tensor.is_meta:
        raise ModelError(
            "is on the meta device: it holds no numbers", where=named.name, remedy="Load the weights first."
        )
    if dtype_name(tensor.dtype) not in RAW_TYPES:
        raise _no_format(named.name, tensor, str(tensor.layout))
    if tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ModelError(
            f"is a {type(tensor).__name__}, a tensor of another quantization tool",
            where=named.name,
            remedy="Pass the float model instead.",
        )
    if named.kind == "parameter" and tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            wrong = torch.nonzero(~torch.isfinite(tensor.detach()))
            value = "NaN" if bool(torch.isnan(tensor.detach()).any()) else "Inf"
            raise ModelError(
                f"holds {value} ({len(wrong)} of {tensor.numel()} values, the first at {wrong[0].tolist()})",
                where=named.name,
                remedy="Repair or reload the weights.",
            )
