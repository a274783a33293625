"""The weights of a model that does not fit in memory: some of them at a time, from the files where they stand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pared import readers
from pared.errors import FileError, ModelError
from pared.files.disk import forget
from pared.fitting.calibration.gathering import pieces
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.parts.sources import Joined, sources_of
from pared.formats.dtypes import ELEMENTS, ITEM_SIZES, as_floats
from pared.model.tensors import ModelTensor, ModelTensors, find_tensors
from pared.readers.listing import ListedTensor, Listing
from pared.readers.naming import aligned

_HALF: Final = 2  # bytes of a number
_AT_ONCE: Final = 1 << 22  # numbers


@dataclass(frozen=True, eq=False)
class Weights:
    """A model on the meta device, and where its numbers stand.

    Args:
        tensors: those of the model: parameters and buffers on the meta device, apart from buffers that no file holds.
        listing: the files.
        places: where each tensor is, or what it is made of, by its first name.
        instead: gives other numbers of each of these tensors, by its first name; None: those of the files.
        opened: what holds the files open; None: their owner does.
    """

    tensors: ModelTensors[nn.Module]
    listing: Listing
    places: Mapping[str, ListedTensor | Joined]
    instead: Callable[[str], Tensor] | None = None
    opened: ExitStack | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """What is sent to another process is where the folder is."""
        assert self.instead is None, "other numbers are of one process"
        stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in self.listing.files.values())
        return _received, (Path(self.listing.where).absolute(), stats)

    @property
    def count(self) -> int:
        """How many numbers all parameters have."""
        return sum(one.tensor.numel() for one in self.tensors if one.kind == "parameter")

    @cached_property
    def order(self) -> Mapping[str, int]:
        """How many tensors stand before each in the model, by its first name."""
        return {tensor.name: number for number, tensor in enumerate(self.tensors)}

    @cached_property
    def _listed(self) -> Mapping[str, ListedTensor]:
        """The tensors of the files, by their names there."""
        return {one.name: one for one in self.listing.tensors}

    def some(self, names: Collection[str]) -> list[ModelTensor]:
        """The tensors of these first names, in the model's order; however many others there are makes no difference."""
        return [self.tensors.tensors[number] for number in sorted({self.order[name] for name in names})]

    @contextmanager
    def loaded(self, names: Collection[str], device: str = "cpu") -> Iterator[ModelTensors[nn.Module]]:
        """The tensors of these first names in float32, in their places in the model, until the context ends."""
        some = self.some(names)
        real = []
        try:
            for tensor in some:
                numbers = self._read(tensor) if tensor.name in self.places else tensor.tensor
                numbers = numbers.to(device)
                if tensor.kind == "parameter":
                    numbers = nn.Parameter(numbers, requires_grad=tensor.tensor.requires_grad)
                _put(self.tensors.model, tensor, numbers)
                real.append(replace(tensor, objects=(numbers,)))
            yield ModelTensors(self.tensors.model, tuple(real))
        finally:
            for tensor in some:
                _put(self.tensors.model, tensor, tensor.tensor)

    @contextmanager
    def around(self, names: Collection[str], *, traced: bool = False) -> Iterator[ModelTensors[nn.Module]]:
        """Likewise, but large tables of embeddings alone stay on the disk, where what is looked up is read.

        Args:
            names: the first names.
            traced: give looked up rows gradients, as those of a loaded table have them.
        """
        some = self.some(names)
        tables = [one for one in some if self._is_table(one)]
        with self.loaded([one.name for one in some if one not in tables]) as loaded:
            lookups = _Lookups({id(one.tensor): self._rows(one) for one in tables}, traced)
            with lookups:
                yield ModelTensors(loaded.model, (*loaded, *tables))

    @contextmanager
    def hollow(self) -> Iterator[Weights]:
        """The same weights, in place of which the model has NaN that take no memory, until the context ends.

        So the model is on the CPU and cannot be trained, and what reads a weight that is not loaded shows it.
        """
        tensors = []
        try:
            for tensor in self.tensors:
                if tensor.name in self.places and tensor.tensor.is_floating_point():
                    numbers = torch.full((), torch.nan, dtype=tensor.tensor.dtype).expand(tensor.tensor.shape)
                elif tensor.name in self.places:
                    numbers = self._read(tensor)
                else:
                    numbers = tensor.tensor
                if tensor.kind == "parameter":
                    numbers = nn.Parameter(numbers, requires_grad=False)
                _put(self.tensors.model, tensor, numbers)
                tensors.append(replace(tensor, objects=(numbers,)))
            yield replace(self, tensors=ModelTensors(self.tensors.model, tuple(tensors)))
        finally:
            for tensor in self.tensors:
                _put(self.tensors.model, tensor, tensor.tensor)

    def groups(self, names: Collection[str], large: int = pieces.LARGE) -> list[list[str]]:
        """The same names, in groups that may be in memory together: tensors of many numbers alone, and all others."""
        some = self.some(names)
        small = [one.name for one in some if one.tensor.numel() < large]
        return [[one.name] for one in some if one.tensor.numel() >= large] + ([small] if small else [])

    def _rows(self, tensor: ModelTensor) -> Callable[[Tensor], Tensor]:
        """Reads rows of a table, float32."""
        held = self.places[tensor.name]
        assert isinstance(held, ListedTensor), "a table is not made of others"

        def read(index: Tensor) -> Tensor:
            array = self.listing.array(held)
            assert array is not None
            found = torch.from_numpy(np.array(as_floats(array[index.reshape(-1).numpy()]), copy=True))
            self._forget(held)
            return found.reshape(*index.shape, -1)

        return read

    def _is_table(self, tensor: ModelTensor) -> bool:
        """Whether a large tensor, not loaded, is the table of an embedding and nothing else."""
        return (
            isinstance(tensor.module, nn.Embedding)
            and len(tensor.names) == 1
            and self.instead is None
            and isinstance(self.places.get(tensor.name), ListedTensor)
            and pieces.may_be_in_pieces(tensor)
        )

    def _read(self, tensor: ModelTensor) -> Tensor:
        if self.instead is not None:
            return self.instead(tensor.name)
        held = self.places[tensor.name]
        if isinstance(held, Joined):
            numbers = held.made(self.tensors.model, lambda name: self._stored(self._listed[name]))
            if numbers.shape != tensor.tensor.shape:
                raise _misshapen(self.listing, tensor, list(numbers.shape))
        else:
            numbers = self._floats(held) if tensor.tensor.is_floating_point() else self._stored(held)
        if tensor.tensor.is_floating_point():
            numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
            if not bool(torch.isfinite(numbers.sum())) and not bool(numbers.isfinite().all()):
                raise ModelError(
                    "has NaN or infinity in its weights",
                    where=tensor.name,
                    remedy="Repair the checkpoint: nothing can be rounded relative to such numbers.",
                )
        return numbers

    def _floats(self, held: ListedTensor) -> Tensor:
        """A tensor of the checkpoint; one of 16 bits is widened to float32 a piece at a time."""
        array = self.listing.array(held)
        if array is None or array.dtype.itemsize != _HALF:
            return self._stored(held)  # which says what cannot be read
        numbers = torch.empty(held.shape, dtype=torch.float32, device="cpu")
        wide, narrow = numbers.view(-1).numpy(), array.reshape(-1)
        for start in range(0, len(narrow), _AT_ONCE):
            wide[start : start + _AT_ONCE] = narrow[start : start + _AT_ONCE]
        self._forget(held)
        return numbers

    def _stored(self, held: ListedTensor) -> Tensor:
        """A tensor of the checkpoint, in its own type, as a copy."""
        array = self.listing.array(held)
        if array is None:
            raise _unreadable(self.listing, held)
        if array.dtype == ELEMENTS["bfloat16"]:  # torch takes no such array
            numbers = torch.from_numpy(np.array(array.view(np.int16), copy=True)).view(torch.bfloat16)
        else:
            numbers = torch.from_numpy(np.array(array, copy=True))
        self._forget(held)
        return numbers

    def _forget(self, held: ListedTensor) -> None:
        """Let the system drop what was read: it is in the file."""
        storage = self.listing.storages[held.storage or ""]
        if storage.content is not None and held.stride is None:
            forget(storage.content()[held.offset : held.offset + held.nbytes])


class _Lookups(TorchFunctionMode):
    """While it is entered, embeddings find their rows elsewhere.

    Args:
        rows: reads rows of a table, by the `id` of the tensor that stands for it.
        traced: see `Weights.around`.
    """

    def __init__(self, rows: Mapping[int, Callable[[Tensor], Tensor]], traced: bool) -> None:
        super().__init__()
        self._rows = rows
        self._traced = traced

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, or look rows up."""
        kwargs = kwargs or {}
        if func is F.embedding:
            index, weight = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("input", "weight")))
            if id(weight) in self._rows:
                found = self._rows[id(weight)](index)
                return found.requires_grad_().clone() if self._traced else found
        return func(*args, **kwargs)


def weights_of(tensors: ModelTensors[nn.Module], listing: Listing) -> Weights:
    """Find the numbers of every tensor of a model.

    Args:
        tensors: those of the model, on the meta device.
        listing: the files.

    Raises:
        FileError: numbers are missing, are of another shape, or cannot be read.
    """
    held = {one.name: one for one in listing.tensors}
    sources = sources_of(tensors.model, list(held))
    wanted = [name for tensor in tensors if tensor.persistent for name in tensor.names]
    names = {**{name: name for name in sources}, **aligned(list(sources), wanted)}
    by_name = {names[name]: one for name, one in sources.items()}
    places: dict[str, ListedTensor | Joined] = {}
    for tensor in tensors:
        if not tensor.tensor.is_meta:
            continue
        source = next((by_name[name] for name in tensor.names if name in by_name), None)
        if source is None:
            raise FileError(
                f"has no numbers for {tensor.name}",
                where=listing.where,
                remedy="Check that no file of the checkpoint is missing: all shards that its index names.",
            )
        for piece in source.pieces if isinstance(source, Joined) else [(source, "")]:
            if held[piece[0]].dtype not in ITEM_SIZES:
                raise _unreadable(listing, held[piece[0]])
        found = source if isinstance(source, Joined) else held[source]
        if isinstance(found, ListedTensor) and tuple(found.shape) != tuple(tensor.tensor.shape):
            raise _misshapen(listing, tensor, list(found.shape))
        places[tensor.name] = found
    return Weights(tensors, listing, places)


def _misshapen(listing: Listing, tensor: ModelTensor, shape: list[int]) -> FileError:
    return FileError(
        f"{tensor.name} has shape {shape}, and in the model of config.json {list(tensor.tensor.shape)}",
        where=listing.where,
        remedy="Put the configuration beside the weights that it belongs to.",
    )


@lru_cache(maxsize=1)  # a worker does many tasks about one model
def _received(folder: Path, _stats: tuple[tuple[int, int], ...]) -> Weights:
    """Those of a folder, in another process; its files stay open until another one is received."""
    opened = ExitStack()
    listing = opened.enter_context(readers.open_listing(folder))
    return replace(weights_of(find_tensors(skeleton_in(folder)), listing), opened=opened)


def _unreadable(listing: Listing, held: ListedTensor) -> FileError:
    return FileError(
        f"{held.name} is stored as {held.dtype}, which is not read here",
        where=listing.where,
        remedy="Pass the checkpoint with float weights.",
    )


def _put(model: nn.Module, tensor: ModelTensor, numbers: Tensor) -> None:
    """Let every name of a tensor in the model stand for these numbers."""
    for name in tensor.names:
        place, _, attribute = name.rpartition(".")
        module = model.get_submodule(place)
        if tensor.kind == "parameter":
            module._parameters[attribute] = numbers  # type: ignore[assignment]  # a parameter, as the caller made it
        else:
            module._buffers[attribute] = numbers
