"""Tensors in memory, listed like those of a file. Torch is not imported here: a caller that has a model has torch."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from pared.readers.listing import ListedTensor, Listing, Storage


def list_model(model: Any) -> Listing:
    """The parameters and buffers of a module, tied ones under each of their names.

    Args:
        model: a `torch.nn.Module`. Its numbers are read where they are, not copied, as long as they are on the CPU.
    """
    tensors: list[ListedTensor] = []
    storages: dict[str, Storage] = {}
    parameters, buffers = (f(remove_duplicate=False) for f in (model.named_parameters, model.named_buffers))
    for name, tensor in (*parameters, *buffers):
        nbytes = tensor.numel() * tensor.element_size()
        key, offset, stride = None, 0, None
        if not tensor.is_meta:
            key, offset, stride, storage = _storage_of(tensor, nbytes)
            storages.setdefault(key, storage)
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors.append(ListedTensor(name, dtype, tuple(tensor.shape), nbytes, key, offset, stride))
    return Listing(
        tuple(tensors),
        storages,
        where=type(model).__name__,
        nbytes=sum(storage.nbytes for storage in storages.values()),
        kind="a model in memory",
    )


def _storage_of(tensor: Any, nbytes: int) -> tuple[str, int, tuple[int, ...] | None, Storage]:
    """The key of a tensor's storage, the tensor's offset and stride in it, and the storage.

    Sparse and opaque tensors do not reveal theirs.
    """
    try:
        storage = tensor.untyped_storage()
        stride = None if tensor.is_contiguous() else tuple(tensor.stride())
        offset = tensor.storage_offset() * tensor.element_size()
        key = f"at {storage.data_ptr() or id(tensor)}"
        return key, offset, stride, Storage(storage.nbytes(), partial(_content, storage))
    except (NotImplementedError, RuntimeError):
        return f"of {id(tensor)}", 0, None, Storage(nbytes)


def _content(storage: Any) -> memoryview:
    torch = sys.modules["torch"]
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy())
