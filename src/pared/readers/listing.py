"""What every reader gives: the tensors of a file, what holds their numbers, and what else takes bytes.

The numbers are not read before somebody asks for them; they then come as NumPy arrays, mapped rather than copied
wherever the file has them plainly. Nothing here uses torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pared.errors import FileError
from pared.files.disk import File
from pared.formats.dtypes import ELEMENTS, Array


@dataclass(frozen=True)
class ListedTensor:
    """A tensor in a file.

    Args:
        name: with a slash between nested dictionaries: "state_dict/encoder.weight".
        dtype: of its elements, in torch's words ("float32"), or in the file's own where torch has none ("Q4_1").
        shape: of the tensor.
        nbytes: of its elements.
        storage: the key of what holds them, maybe for other tensors too; None where it holds no numbers at all
            (a tensor on the meta device).
        offset: of its first element in the content of the storage, in bytes.
        stride: between neighbours in each dimension, in elements; None: without gaps, in C order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    storage: str | None
    offset: int = 0
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes in a file that hold the numbers of one tensor, or of several.

    Args:
        nbytes: that it takes in the file.
        content: gives the numbers' bytes when it is called, inflated where the file has them compressed; None where
            there is no way to them.
        coded: whether the file has the numbers compressed or otherwise coded, so that `nbytes` tells nothing of how
            many there are.
    """

    nbytes: int
    content: Callable[[], memoryview] | None = None
    coded: bool = False


@dataclass(frozen=True)
class Note:
    """Something else in a file that takes bytes.

    Args:
        nbytes: that it takes.
        because: why, where that needs words.
        ballast: whether the model needs none of it.
        file: whether it is a whole file, of a folder.
    """

    nbytes: int
    because: str = ""
    ballast: bool = False
    file: bool = False


@dataclass(frozen=True)
class Listing:
    """All tensors of a file, or of the files of a folder.

    Args:
        tensors: in the file's own order.
        storages: by key; storages of no tensor included.
        notes: what else has a size worth a name, by that name in parentheses: "(header)", of a folder
            "(model.safetensors: header)" and "(config.json)".
        imports: the functions and classes that loading would import, beyond what tensors need: "os.system".
        where: the path, or another name for messages.
        nbytes: of all the files together.
        kind: what was read, in words: "a .safetensors file", "a Hugging Face folder".
        beside: the files beside it that hold some of its numbers, as paths relative to its folder.
        flat: whether the file has no dictionaries within others, so that a slash in a name is a part of it.
    """

    tensors: tuple[ListedTensor, ...]
    storages: Mapping[str, Storage] = field(default_factory=dict)
    notes: Mapping[str, Note] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    where: str = ""
    nbytes: int = 0
    kind: str = ""
    beside: tuple[str, ...] = ()
    flat: bool = False

    def array(self, held: ListedTensor) -> Array | None:
        """The numbers of a tensor, mapped where the file has them plainly; of the types in `formats.dtypes.ELEMENTS`.

        Args:
            held: one of `tensors`.

        Returns:
            an array of the tensor's shape, which strides of 0 may make far larger than its storage; None where the
            file has no numbers for it, has them in blocks, or so compressed that inflating them would fill the memory.

        Raises:
            CorruptError: they cannot be read.
        """
        storage = None if held.storage is None else self.storages[held.storage]
        if storage is None or storage.content is None or held.dtype not in ELEMENTS:
            return None
        kind = ELEMENTS[held.dtype]
        content = storage.content()
        if held.stride is None:
            flat = np.frombuffer(content, kind, count=held.nbytes // kind.itemsize, offset=held.offset)
            return flat.reshape(held.shape)
        flat = np.frombuffer(content, kind, count=(len(content) - held.offset) // kind.itemsize, offset=held.offset)
        strides = [step * kind.itemsize for step in held.stride]
        return np.lib.stride_tricks.as_strided(flat, held.shape, strides, writeable=False)


def unknown(file: File, kind: str) -> FileError:
    """The error for a file that nobody here can look into."""
    return FileError(
        f"is {kind}, which pared cannot look into yet",
        where=file.where,
        remedy="Pass a file of torch, safetensors, ONNX, GGUF or NumPy, or a folder of such files.",
    )
