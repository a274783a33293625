"""Small sound files of every kind that is read, written by the formats' own libraries."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo

from pared.formats.coded import Grid, Grouped
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from tests.formats.groups.grids import GRIDS
from tests.inspection.test_ledger import artifact, as_pt, as_safetensors


class Pair(nn.Module):
    """Two layers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.other = nn.Sequential(nn.Linear(2, 2))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        found: torch.Tensor = self.other(self.layer(x)) * self.scale
        return found


def saved(value: object, **options: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def written(write: Callable[[Path], object], name: str = "file") -> bytes:
    """What is written to a path."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


STATE = {"w": torch.arange(6.0).reshape(2, 3), "t": torch.ones(2, 2).t()[1:], "n": torch.tensor([1, 2])}


def checkpoint() -> dict[str, object]:
    """What training saves."""
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scales, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    codes = torch.quantize_per_channel(torch.ones(2, 2), scales, zeros, 0, torch.qint8)
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "q": codes,
        "s": torch.eye(2).to_sparse(),
    }


def scripted() -> bytes:
    """A TorchScript archive."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(Pair(), torch.ones(1, 3)), stream)
    return stream.getvalue()


def exported() -> bytes:
    """A .pt2 archive without its graph, which no reader looks into and which is most of its bytes."""
    program = torch.export.export(Pair(), (torch.ones(1, 3),))
    stream, small = io.BytesIO(), io.BytesIO()
    torch.export.save(program, stream)
    with zipfile.ZipFile(stream) as archive, zipfile.ZipFile(small, "w") as other:
        for info in archive.infolist():
            content = b"{}" if "/models/" in info.filename else archive.read(info)
            if "sample_inputs" not in info.filename:
                other.writestr(info.filename, content)
    return small.getvalue()


def with_groups() -> bytes:
    """An artifact of version 4, with steps that are nested and steps that are not."""
    tensors = []
    for name in ("Q4_K", "int4 g5"):
        coded = Grouped(GRIDS[name]).encode(torch.arange(96.0).reshape(2, 48))
        tensors.append(Stored((name,), "parameter", coded, Decision(name, "grid", None, "")))
    return storage.to_bytes(Contents(tuple(tensors)), "safetensors")


def with_scales() -> bytes:
    """An artifact of the newest version, with scales on the scale of steps, and others."""
    tensors = []
    for name, scale in {"on": 0.5, "off": 0.3}.items():
        numbers = torch.arange(96.0).reshape(2, 48)
        coded = Grid("int8", scaled=True).encode(numbers, torch.ones(2), None, torch.full((48,), scale))
        tensors.append(Stored((name,), "parameter", coded, Decision(name, "grid", None, "")))
    return storage.to_bytes(Contents(tuple(tensors)), "safetensors")


def onnx_model(outside: bool = False) -> bytes:
    """A model with every way to hold numbers."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    typed = helper.make_tensor("inner", TensorProto.INT32, (3,), [1, -2, 300])
    constant = helper.make_node("Constant", [], ["c"], value=typed)
    branch = helper.make_graph([constant], "b", [], [value])
    nodes = [constant, helper.make_node("If", ["i"], ["y"], then_branch=branch, else_branch=branch)]
    tensors = [
        numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w"),
        helper.make_tensor("f", TensorProto.FLOAT, (2,), [1.0, 2.0]),
        helper.make_tensor("h", TensorProto.FLOAT16, (2,), [1.0, 2.0]),
        helper.make_tensor("l", TensorProto.INT64, (2,), [1, -1]),
    ]
    if outside:
        for name, offset in (("o", 0), ("p", 8)):
            tensor = TensorProto(name=name, data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
            for key, text in (("location", "data"), ("offset", str(offset)), ("length", "8")):
                tensor.external_data.add(key=key, value=text)
            tensors.append(tensor)
    model = helper.make_model(helper.make_graph(nodes, "g", [], [value], tensors))
    return bytes(model.SerializeToString())


def write_gguf(path: Path) -> None:
    """Metadata of all types, plain tensors and blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "bc"])
    writer.add_array("numbers", [1, 2])
    writer.add_tensor("w", np.ones((2, 32), np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q", gguf.quants.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arrays(write: Callable[..., None]) -> bytes:
    """An .npz archive."""
    stream = io.BytesIO()
    write(
        stream,
        a=np.arange(6.0).reshape(2, 3),
        f=np.asfortranarray(np.ones((2, 2), ">f4")),
        o=np.array([{}, ()], object),
    )
    return stream.getvalue()


def array() -> bytes:
    """An .npy file."""
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    return stream.getvalue()


def without_debug(file: bytes) -> bytes:
    """An archive without the members that only take time to pack."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as archive, zipfile.ZipFile(stream, "w") as other:
        for info in archive.infolist():
            if not info.filename.endswith(".debug_pkl"):
                other.writestr(info, archive.read(info))
    return stream.getvalue()


SHARDS = {f"model-{i}-of-00002.safetensors": {name: torch.ones(2)} for i, name in (("00001", "w"), ("00002", "b"))}


def index() -> bytes:
    """The index of a folder of shards."""
    placed = {name: file for file, tensors in SHARDS.items() for name in tensors}
    return json.dumps({"metadata": {"total_size": 16}, "weight_map": placed}).encode()


def distributed() -> tuple[bytes, bytes]:
    """The metadata and the chunks of a checkpoint of torch.distributed.checkpoint."""
    chunks, places, state = b"", {}, {}
    for name, sizes in (("w", [(2, 3), (1, 3)]), ("b", [(4,)])):
        parts, row = [], 0
        for size in sizes:
            piece = saved(torch.ones(size))
            offsets = torch.Size((row, *(0 for _ in size[1:])))
            parts.append(described.ChunkStorageMetadata(offsets, torch.Size(size)))
            places[described.MetadataIndex(name, offsets)] = _StorageInfo("__0_0.distcp", len(chunks), len(piece))
            chunks, row = chunks + piece, row + size[0]
        shape = torch.Size((row, *sizes[0][1:]))
        state[name] = described.TensorStorageMetadata(described.TensorProperties(torch.float32), shape, parts)
    paths = {"w": ("model", "w"), "b": ("model", "b")}
    return pickle.dumps(described.Metadata(state, paths, places)), chunks


# What stands beside the damaged file: what a model of ONNX may refer to, and the shards of a folder.
BESIDE: dict[str, bytes] = {
    "data": bytes(range(16)),
    "dcp/__0_0.distcp": distributed()[1],
    **{f"model/{name}": safetensors.torch.save(tensors) for name, tensors in SHARDS.items()},
}

BASES: dict[str, Callable[[], list[bytes]]] = {
    "artifact.pt": lambda: [as_pt(*artifact())],
    "artifact.safetensors": lambda: [as_safetensors(*artifact())],
    "artifact with groups": lambda: [with_groups()],
    "artifact with scales": lambda: [with_scales()],
    "torch zip": lambda: [saved(STATE), saved(checkpoint())],
    "torch legacy": lambda: [saved(v, _use_new_zipfile_serialization=False) for v in (STATE, checkpoint(), Pair())],
    "pickled module": lambda: [saved(Pair())],
    "TorchScript": lambda: [without_debug(scripted())],
    "pt2": lambda: [exported()],
    "safetensors": lambda: [safetensors.torch.save({k: v.contiguous() for k, v in STATE.items()}, {"format": "pt"})],
    "ONNX": lambda: [onnx_model()],
    "ONNX with data outside": lambda: [onnx_model(outside=True)],
    "GGUF": lambda: [written(write_gguf)],
    "npy": lambda: [array()],
    "npz": lambda: [arrays(np.savez), arrays(np.savez_compressed)],
    "folder": lambda: [index()],
    "distributed checkpoint": lambda: [distributed()[0]],
}
