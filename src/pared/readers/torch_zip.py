"""What `torch.save` writes: a zip archive with a pickle that describes the tensors, and a member for each storage.

Nothing in a file is executed and no tensor is read. Sizes are computed from shapes and types and compared with what
the file has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from pared import container
from pared.container import PICKLE, Archive, File, Member, Place
from pared.errors import UnsafeError
from pared.pickles import Name, Node, Persistent, read_pickle
from pared.readers.listing import Held, Listing, Note, Storage, unknown

# The bits of one element of each of torch's types.
_BITS: Final[Mapping[str, int]] = {
    **{name: 8 * size for name, size in container.ITEM_SIZES.items()},
    "uint16": 16, "uint32": 32, "uint64": 64, "complex32": 32,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8,
    "float4_e2m1fn_x2": 8, "qint8": 8, "quint8": 8, "qint32": 32, "quint4x2": 4, "quint2x4": 2,
}  # fmt: skip

# The type of the elements in each of torch's classes of storage.
_STORAGES: Final[Mapping[str, str]] = {
    "torch.FloatStorage": "float32", "torch.DoubleStorage": "float64", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool", "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128", "torch.QInt8Storage": "qint8", "torch.QUInt8Storage": "quint8",
    "torch.QInt32Storage": "qint32", "torch.QUInt4x2Storage": "quint4x2", "torch.QUInt2x4Storage": "quint2x4",
    "torch.storage.UntypedStorage": "uint8",
}  # fmt: skip

# The functions that make a tensor of (storage, offset, size, stride, ...).
_REBUILD: Final = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
)
_REBUILD_WITH_TYPE: Final = "torch._utils._rebuild_tensor_v3"  # its seventh argument is the element type
_REBUILD_META: Final = "torch._utils._rebuild_meta_tensor_no_storage"  # of (type, size, stride, ...)
_REBUILD_SUBCLASS: Final = "torch._tensor._rebuild_from_type_v2"  # of (function, class, arguments, state)

# What else state dicts, optimizer states and plain data refer to. None of it is ever called here.
_HARMLESS: Final = frozenset(
    (
        *_REBUILD, _REBUILD_META, _REBUILD_SUBCLASS, *_STORAGES, *(f"torch.{name}" for name in _BITS),
        "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state", "torch.Tensor", "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer", "torch.Size", "torch.device", "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion", "torch.per_tensor_affine", "torch.per_channel_affine",
        "torch.per_channel_affine_float_qparams", "collections.OrderedDict", "collections.defaultdict",
        "collections.Counter", "collections.deque", "_codecs.encode", "builtins.set", "builtins.frozenset",
        "builtins.list", "builtins.dict", "builtins.tuple", "builtins.int", "builtins.float", "builtins.bool",
        "builtins.str", "builtins.bytes", "builtins.bytearray", "builtins.complex", "builtins.slice",
        "builtins.range", "__builtin__.set", "__builtin__.bytearray", "__builtin__.complex", "numpy.dtype",
        "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "datetime.datetime",
        "datetime.date", "datetime.timedelta",
    )
)  # fmt: skip

_LARGEST_PICKLE: Final = 64 << 20
_DEEPEST: Final = 100
_LEAST_NAMES: Final = 1 << 20  # characters
_NAMES_PER_BYTE: Final = 16  # beyond the least, for each byte of the pickle


def read_torch_zip(file: File, archive: Archive) -> Listing:
    """The tensors of a zip archive that `torch.save` wrote.

    Raises:
        FileError: it is another kind of archive.
        CorruptError: it contradicts itself.
        UnsafeError: loading it would run code.
    """
    folder = container.torch_folder(file, archive)
    names = {member.name for member in archive.members}
    if folder is None:
        numpy = all(name.endswith(".npy") for name in names)
        raise unknown(file, "a NumPy .npz archive" if numpy else "a zip archive that torch.save did not write")
    if f"{folder}constants.pkl" in names:
        raise unknown(file, "a TorchScript archive")
    members = {member.name.removeprefix(folder): member for member in archive.members}
    pickle = members[PICKLE]
    if pickle.stored > _LARGEST_PICKLE:
        raise unknown(file, f"a torch file whose pickle has {pickle.stored:,} bytes")
    root = read_pickle(container.checked_content(file, pickle), _HARMLESS, file.where)
    storages = {name[5:]: member for name, member in members.items() if name.startswith("data/")}
    tensors = tuple(_tensors(root, storages, file.where, _LEAST_NAMES + _NAMES_PER_BYTE * pickle.stored))
    held = {key: Storage(member.stored, partial(_content, file, member)) for key, member in storages.items()}
    return Listing(tensors, held, {"(pickle)": Note(pickle.stored)})


def _content(file: File, member: Member) -> memoryview:
    return file.data[member.offset : member.end]


def _tensors(root: object, storages: Mapping[str, Member], where: str, allowance: int) -> Iterator[Held]:
    """Every tensor in what a pickle describes; whatever holds others is entered once, so that nothing is endless.

    Names are longer than the pickle where it nests them; `allowance` bounds their characters in all.
    """
    waiting: list[tuple[str, Node, int]] = [("", root, 0)] if isinstance(root, Node) else []
    entered: set[int] = set()
    while waiting:
        name, node, depth = waiting.pop()
        path, arguments = _call_of(node)
        if path in _REBUILD or path == _REBUILD_META:
            yield _held(name, path, arguments, storages, Place(f"{where}: {name}"))
        if id(node) not in entered:
            entered.add(id(node))
            inside = []
            for inner, child in _inside(name, node, arguments):
                allowance -= len(inner)
                if depth == _DEEPEST or allowance < 0:
                    raise UnsafeError(
                        "its pickle nests names or containers deeper than any state dict",
                        where=where,
                        remedy="Do not use this file.",
                    )
                inside.append((inner, child, depth + 1))
            waiting += reversed(inside)


def _inside(name: str, node: Node, arguments: Sequence[object]) -> Iterator[tuple[str, Node]]:
    """What a node holds, with names; a parameter is a call around its tensor, which has the same name.

    A tensor may hold others in its turn: the scales of one that is quantized by channels.
    """
    yield from ((name, value) for value in arguments if isinstance(value, Node))
    yield from ((_join(name, i), value) for i, value in enumerate(node.values) if isinstance(value, Node))
    yield from ((_join(name, key), value) for key, value in node.pairs if isinstance(value, Node))


def _call_of(node: Node) -> tuple[str, Sequence[object]]:
    """What would be called to make a node, and with what; "" if nothing would."""
    if node.call is None:
        return "", ()
    if node.call.path == _REBUILD_SUBCLASS and len(node.arguments) > 2:
        function, _, arguments, *_ = node.arguments
        if isinstance(function, Name) and isinstance(arguments, Node):
            return function.path, arguments.values
    return node.call.path, node.arguments


def _join(name: str, key: object) -> str:
    if isinstance(key, int) and abs(key) < 1 << 63:
        key = str(key)
    # Python's strings may hold halves of characters, which can be neither written nor printed.
    label = key.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(key, str) else "(key)"
    return f"{name}/{label}" if name else label


def _held(name: str, path: str, arguments: Sequence[object], storages: Mapping[str, Member], at: Place) -> Held:
    if path == _REBUILD_META:
        kind, size, *_ = _at_least(arguments, 2, at)
        return Held(name, _element_type(kind, at), _shape(size, at), 0, None)
    reference, offset, size, stride = _at_least(arguments, 4, at)[:4]
    key, kind, nbytes = _storage(reference, storages, at)
    if path == _REBUILD_WITH_TYPE:
        kind = _element_type(_at_least(arguments, 7, at)[6], at)
    shape = _shape(size, at)
    strides = [at.whole(step, "a stride") for step in _values(stride, at)]
    if len(strides) != len(shape):
        at.fail(f"it has {len(shape)} sizes and {len(strides)} strides")
    reach = at.whole(offset, "its offset") + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (reach + 1) * _BITS[kind] > 8 * nbytes:
        at.fail(f"it reaches beyond its storage, which has {nbytes:,} bytes")
    start = at.whole(offset, "its offset") * _BITS[kind] // 8
    packed = tuple(strides) == _packed(shape)
    return Held(
        name, kind, shape, -(-math.prod(shape) * _BITS[kind] // 8), key, start, None if packed else tuple(strides)
    )


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps, in C order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _storage(reference: object, storages: Mapping[str, Member], at: Place) -> tuple[str, str, int]:
    """The key, the element type and the bytes of a storage that the pickle refers to."""
    fields = _at_least(reference.fields if isinstance(reference, Persistent) else (), 5, at)
    tag, kind, key, _, count = fields[:5]
    if tag != "storage" or not isinstance(kind, Name) or kind.path not in _STORAGES or not isinstance(key, str):
        at.fail("it refers to something that is no storage")
    if key not in storages:
        at.fail(f"its storage 'data/{key[:80]}' is missing")
    dtype, nbytes = _STORAGES[kind.path], storages[key].nbytes
    expected = at.whole(count, "the size of its storage") * max(1, _BITS[dtype] // 8)
    if nbytes != expected:
        at.fail(f"its storage 'data/{key[:80]}' has {nbytes:,} bytes where the pickle says {expected:,}")
    return key, dtype, nbytes


def _at_least(values: Sequence[object], least: int, at: Place) -> Sequence[object]:
    return values if len(values) >= least else at.fail("its description in the pickle is incomplete")


def _values(value: object, at: Place) -> list[object]:
    return value.values if isinstance(value, Node) else at.fail("its sizes or strides are no list")


def _shape(value: object, at: Place) -> tuple[int, ...]:
    return at.shape(_values(value, at), "shape")


def _element_type(value: object, at: Place) -> str:
    kind = value.path.removeprefix("torch.") if isinstance(value, Name) else ""
    return kind if kind in _BITS else at.fail("its element type is none of torch's")
