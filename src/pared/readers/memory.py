"""Tensors in memory, listed like those of a file. Torch is not imported here: a caller that has a model has torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from pared.errors import ModelError
from pared.formats.dtypes import ELEMENTS, Array, bytes_of
from pared.readers.listing import ListedTensor, Listing, Storage


def is_model(target: object) -> bool:
    """Whether something is a `torch.nn.Module`; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(target, torch.nn.Module)


def is_state_dict(target: object) -> bool:
    """Whether something is a mapping with a tensor of torch among its values."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(target, Mapping):
        return False
    return any(isinstance(value, torch.Tensor) for value in target.values())


def list_model(model: Any) -> Listing:
    """The parameters and buffers of a `torch.nn.Module`, tied ones under each of their names; see `list_state_dict`.

    Raises:
        ModelError: its modules nest deeper than torch can walk through them.
    """
    named = (f(remove_duplicate=False) for f in (model.named_parameters, model.named_buffers))
    try:
        tensors = {name: tensor for group in named for name, tensor in group}
    except RecursionError as error:
        raise ModelError(
            f"its modules nest deeper than Python calls functions within functions, {sys.getrecursionlimit():,} deep",
            where=type(model).__name__,
            remedy="Put the layers into one nn.Sequential, one after the other, or raise sys.setrecursionlimit.",
        ) from error
    return list_state_dict(tensors, type(model).__name__)


def list_state_dict(state: Mapping[Any, Any], where: str = "state dict") -> Listing:
    """The tensors of a state dict. Their numbers are read where they are, not copied, if they are on the CPU.

    Args:
        state: tensors by name; other values, such as versions, are skipped.
        where: a name for messages.
    """
    torch = sys.modules["torch"]
    tensors: list[ListedTensor] = []
    storages: dict[str, Storage] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        nbytes = tensor.numel() * tensor.element_size()
        key, offset, stride = None, 0, None
        if not tensor.is_meta:
            key, offset, stride, storage = _storage_of(tensor, nbytes)
            storages.setdefault(key, storage)
        dtype, format = str(tensor.dtype).removeprefix("torch."), ""
        if tensor.is_quantized:
            dtype, format = "float32", dtype
        tensors.append(ListedTensor(str(name), dtype, tuple(tensor.shape), nbytes, key, offset, stride, format))
    return Listing(
        tuple(tensors),
        storages,
        where=where,
        nbytes=sum(storage.nbytes for storage in storages.values()),
        kind="a model in memory",
    )


def _storage_of(tensor: Any, nbytes: int) -> tuple[str, int, tuple[int, ...] | None, Storage]:
    """The key of a tensor's storage, the tensor's offset and stride in it, and the storage.

    Tensors whose numbers must be computed (quantized, conjugated, sparse, opaque) have a storage of their own.
    """
    if not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg()):
        try:
            storage = tensor.untyped_storage()
            stride = None if tensor.is_contiguous() else tuple(tensor.stride())
            offset = tensor.storage_offset() * tensor.element_size()
            key = f"at {storage.data_ptr() or id(tensor)}"
            return key, offset, stride, Storage(storage.nbytes(), partial(_content, storage))
        except (NotImplementedError, RuntimeError):  # sparse and opaque tensors do not reveal theirs
            pass
    return f"of {id(tensor)}", 0, None, Storage(nbytes, lambda: bytes_of(array_of(tensor)))


def _content(storage: Any) -> memoryview:
    torch = sys.modules["torch"]
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy())


def array_of(tensor: Any) -> Array:
    """The numbers of a tensor in memory, as `Listing.array` gives those of a file.

    Args:
        tensor: a `torch.Tensor` of any layout, on any device but meta; one that is quantized is decoded.
    """
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if str(tensor.layout) != "torch.strided" else tensor
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    kind = ELEMENTS[str(tensor.dtype).removeprefix("torch.")]
    torch = sys.modules["torch"]
    if kind.isbuiltin != 1:  # torch hands over the types of NumPy itself
        tensor = tensor.contiguous().view(torch.int16 if kind.itemsize == 2 else torch.uint8)
    array: Array = tensor.numpy().view(kind)
    return array
