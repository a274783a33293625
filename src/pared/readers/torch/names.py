"""The names in torch's pickles: types, storages, and the functions that make tensors. None of them is ever called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pared.formats.dtypes import TYPES

# The kind of a file in another byte order, for error messages.
BIG_ENDIAN: Final = "a torch file of a big-endian machine"

# The element type of each of torch's storage classes.
STORAGES: Final[Mapping[str, str]] = {
    "torch.FloatStorage": "float32", "torch.DoubleStorage": "float64", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool", "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128", "torch.QInt8Storage": "qint8", "torch.QUInt8Storage": "quint8",
    "torch.QInt32Storage": "qint32", "torch.QUInt4x2Storage": "quint4x2", "torch.QUInt2x4Storage": "quint2x4",
    "torch.storage.UntypedStorage": "uint8",
}  # fmt: skip

# The functions that make a tensor of (storage, offset, size, stride, ...).
REBUILD: Final = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
)
REBUILD_WITH_TYPE: Final = "torch._utils._rebuild_tensor_v3"  # its seventh argument is the element type
REBUILD_META: Final = "torch._utils._rebuild_meta_tensor_no_storage"  # of (type, size, stride, ...)
REBUILD_SUBCLASS: Final = "torch._tensor._rebuild_from_type_v2"  # of (function, class, arguments, state)
REBUILD_PARAMETER: Final = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")

# The functions that make tensors of other tensors, and what they make.
UNUSUAL: Final[Mapping[str, str]] = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "tensor subclass",
    "torch.nested._internal.nested_tensor._rebuild_njt": "nested tensor",
}

# Everything else that state dicts, optimizer states and plain data refer to.
HARMLESS: Final = frozenset(
    (
        *REBUILD, REBUILD_META, REBUILD_SUBCLASS, *STORAGES, *(f"torch.{name}" for name in TYPES),
        *REBUILD_PARAMETER, "torch._utils._rebuild_sparse_tensor", "torch.Tensor",
        "torch.ScriptObject", "torch.nn.parameter.Parameter",
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
