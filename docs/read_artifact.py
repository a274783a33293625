"""Read an artifact of pared with numpy and the standard library alone: neither torch nor pared is needed.

    python read_artifact.py best_model.pt

`read` gives all tensors as numpy arrays. It is written from `format.md`, and shares no code with pared: it shows that
the format is what that page says. bfloat16, which numpy lacks, comes as float32 with the same values.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SYMBOLS = 65_024  # in a full chunk
RADIX = {1: 256, 2: 16, 3: 6, 4: 4}  # of the digits in a symbol, by how many there are


def read(path: str | Path) -> dict[str, Array]:
    """All tensors of an artifact by name; tied names give the same array.

    Args:
        path: of a `.pt` or `.safetensors` artifact.

    Raises:
        ValueError: it is no artifact, it is damaged, or its version is newer than 1.
    """
    record, data = records(Path(path))
    index = json.loads(zlib.decompress(record))
    if index["pared"] != 1:
        raise ValueError(f"version {index['pared']} of the format is newer than this reader")
    found = {}
    for entry in index["tensors"]:
        array = tensor(entry, data)
        for name in (entry["name"], *entry.get("aliases", [])):
            found[name] = array
    return found


def records(path: Path) -> tuple[bytes, bytes]:
    """The index and the data, from either container."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                folder = archive.namelist()[0].split("/")[0]
                return archive.read(f"{folder}/data/0"), archive.read(f"{folder}/data/1")
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        body = file.read()
    if header.get("__metadata__", {}).get("format") != "pared":
        raise ValueError(f"{path} is no artifact of pared")
    index, data = (body[slice(*header[name]["data_offsets"])] for name in ("index", "data"))
    return index, data


def tensor(entry: dict[str, Any], data: bytes) -> Array:
    """One tensor in its source's shape and type."""
    parts = {name: checked(data, part, f"{entry['name']}: {name}") for name, part in entry["parts"].items()}
    tag, dtype, shape = entry["format"]["tag"], entry["dtype"], tuple(entry["shape"])
    if tag == "raw":
        return plain(parts["values"], dtype).reshape(shape)
    if tag == "float":
        return cast(plain(parts["values"], entry["format"]["dtype"]), dtype).reshape(shape)
    if tag != "grid":
        raise ValueError(f"{entry['name']}: the format {tag!r} is not known")
    view = entry.get("view", {"split": shape, "rows": [0]})
    split, rows = view["split"], view["rows"]
    kind = entry["format"]["codes"]
    codes = decode(parts["codes"], entry["parts"]["codes"].get("coding"), math.prod(shape), kind)
    step = plain(parts["step"], "float32").reshape([n if i in rows else 1 for i, n in enumerate(split)])
    return cast(codes.reshape(split).astype(np.float32) * step, dtype).reshape(shape)


def checked(data: bytes, part: dict[str, Any], where: str) -> bytes:
    """The bytes of a part, compared with their checksum."""
    payload = data[part["offset"] : part["offset"] + part["length"]]
    if len(payload) != part["length"] or zlib.crc32(payload) != part["crc32"]:
        raise ValueError(f"{where}: the checksum does not match")
    return payload


def plain(payload: bytes, dtype: str) -> Array:
    """Little-endian values as they stand; bfloat16 is the upper half of float32."""
    if dtype == "bfloat16":
        wide = np.frombuffer(payload, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    kind = np.dtype(dtype)
    return np.frombuffer(payload, kind.newbyteorder("<")).astype(kind)


def cast(values: Array, dtype: str) -> Array:
    """The values in the source's type, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isnan(values), values, rounded.view(np.float32)).astype(np.float32)


def decode(payload: bytes, coding: dict[str, int] | None, count: int, dtype: str) -> Array:
    """The codes of a stream, int8 or int16."""
    if coding is None:
        return plain(payload, dtype)
    if "constant" in coding:
        return np.full(count, coding["constant"], dtype)
    per_symbol, low_bits = coding["per_symbol"], coding.get("low_bits", 0)
    span = SYMBOLS * per_symbol
    sizes = [min(span, count - start) for start in range(0, count, span)]
    position = 4 * (len(sizes) - 1)
    lengths = [*struct.unpack(f"<{len(sizes) - 1}I", payload[:position]), len(payload)]
    chunks = []
    for size, length in zip(sizes, lengths, strict=True):
        chunks.append(decode_chunk(payload[position : position + length], per_symbol, low_bits, size, dtype))
        position += length
    return np.concatenate(chunks)


def decode_chunk(chunk: bytes, per_symbol: int, low_bits: int, count: int, dtype: str) -> Array:
    """The codes of one chunk: low bits as they are, then symbols, then escapes."""
    low_size = math.ceil(count * low_bits / 8)
    n_symbols = math.ceil(count / per_symbol)
    inflater = zlib.decompressobj(-15)
    symbols = np.frombuffer(inflater.decompress(chunk[low_size:], n_symbols + 1), np.uint8).astype(np.int32)
    if len(symbols) != n_symbols or not inflater.eof:
        raise ValueError(f"a chunk does not hold exactly {n_symbols} symbols")
    radix = RADIX[per_symbol]
    digits = np.stack([symbols // radix**i % radix for i in range(per_symbol)], axis=1).reshape(-1)[:count]
    high = digits - (radix // 2 - 1)
    all_have_digits = radix == 2 ** (8 * np.dtype(dtype).itemsize - low_bits)
    high[digits == radix - 1] = -radix // 2 if all_have_digits else plain(inflater.unused_data, dtype)
    low = np.frombuffer(chunk[:low_size], np.uint8).astype(np.int32)
    if low_bits == 4:
        low = np.concatenate([low & 15, low >> 4])[:count]
    return (high if low_bits == 0 else high << low_bits | low).astype(dtype)


if __name__ == "__main__":
    for name, array in read(sys.argv[1]).items():
        sys.stdout.write(f"{name} {array.dtype} {array.shape}\n")
