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

# 2^(k / 8) for k from 0 to 7, as float32.
OCTAVE = np.array(
    [
        *(1.0, 1.0905077457427979, 1.1892070770263672, 1.2968395948410034),
        *(1.4142135381698608, 1.5422108173370361, 1.6817928552627563, 1.8340080976486206),
    ],
    np.float32,
)


def read(path: str | Path) -> dict[str, Array]:
    """All tensors of an artifact by name; tied names give the same array.

    Args:
        path: a `.pt` or `.safetensors` artifact.

    Raises:
        ValueError: it is not an artifact, it is damaged, or its version is newer than 5.
    """
    record, data = records(Path(path))
    index = json.loads(zlib.decompress(record))
    if index["pared"] not in (1, 2, 3, 4, 5):
        raise ValueError(f"version {index['pared']} of the format is newer than this reader")
    found, end = {}, 0
    for entry in index["tensors"]:
        if index["pared"] == 1:
            parts = {name: data[part["offset"] :][: part["length"]] for name, part in entry["parts"].items()}
            checksums = [(zlib.crc32(parts[name]), part["crc32"]) for name, part in entry["parts"].items()]
        else:
            parts, end = cut(entry, data, end)
            checksums = [(zlib.crc32(b"".join(parts.values())), entry["crc32"])]
        if any(ours != theirs for ours, theirs in checksums):
            raise ValueError(f"{entry['name']}: the checksum does not match")
        array = tensor(entry, parts)
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
        raise ValueError(f"{path} is not an artifact of pared")
    index, data = (body[slice(*header[name]["data_offsets"])] for name in ("index", "data"))
    return index, data


def cut(entry: dict[str, Any], data: bytes, end: int) -> tuple[dict[str, bytes], int]:
    """The parts of an entry of version 2 to 5, in the order of the data, and where the last one ends."""
    parts = {}
    for name, part in sorted(entry["parts"].items()):
        length = part.get("length", 0 if "coding" in part else plain_length(entry, name, part))
        end += -end % 64 if length >= 4096 else 0
        parts[name] = data[end : end + length]
        end += length
    return parts, end


def plain_length(entry: dict[str, Any], name: str, part: dict[str, Any]) -> int:
    """The bytes of a part whose numbers are not coded."""
    elements: int = math.prod(entry["shape"])
    if name == "values":
        return elements * size_of(entry["format"].get("dtype", entry["dtype"]))
    split, rows = view_of(entry)
    n_rows = math.prod(split[i] for i in rows)
    if entry["format"]["tag"] == "groups" and not name.startswith(("codes", "classes")):
        return math.prod(group_shape(entry, name)) * (size_of(step_type(entry)) if name in ("step", "least") else 1)
    n_columns = math.prod(n for i, n in enumerate(split) if i not in rows)
    lines = n_columns if "scaled" in entry["format"] else n_rows
    if name in ("step", "scale"):
        return (n_rows if name == "step" else n_columns) * (1 if "base" in part else 4)
    if name == "classes":
        return lines
    count = int(part["rows"]) * elements // lines if "rows" in part else elements
    return count * size_of(entry["format"].get("codes", "int8"))


def size_of(dtype: str) -> int:
    """The bytes of one number."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def view_of(entry: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The shape in which codes meet steps, and which of its dimensions have steps."""
    view = entry.get("view", {"split": entry["shape"], "rows": [0]})
    return view["split"], view["rows"]


def tensor(entry: dict[str, Any], parts: dict[str, bytes]) -> Array:
    """One tensor in its source's shape and type."""
    tag, dtype, shape = entry["format"]["tag"], entry["dtype"], tuple(entry["shape"])
    if tag == "raw":
        return plain(parts["values"], dtype).reshape(shape)
    if tag == "float":
        return cast(plain(parts["values"], entry["format"]["dtype"]), dtype).reshape(shape)
    if tag == "groups":
        return cast(grouped(entry, parts), dtype).reshape(shape)
    if tag != "grid":
        raise ValueError(f"{entry['name']}: the format {tag!r} is not known")
    split, rows = view_of(entry)
    values = codes(entry, parts).astype(np.float32)
    for name, along in (("step", rows), ("scale", [i for i in range(len(split)) if i not in rows])):
        if name in parts:
            numbers = steps(entry, parts, name, math.prod(split[i] for i in along))
            values = values * numbers.reshape([n if i in along else 1 for i, n in enumerate(split)])
    return cast(values, dtype).reshape(shape)


def codes(entry: dict[str, Any], parts: dict[str, bytes]) -> Array:
    """The codes of a grid, in the shape in which they meet steps."""
    (split, rows), kind = view_of(entry), entry["format"].get("codes", "int8")

    def stream(name: str, count: int, kind: str) -> Array:
        return decode(parts[name], entry["parts"][name].get("coding"), count, kind)

    if "codes" in parts:
        return stream("codes", math.prod(split), kind).reshape(split)
    if "scaled" in entry["format"]:  # classes are of columns
        rows = [i for i in range(len(split)) if i not in rows]
    n_rows = math.prod(split[i] for i in rows)
    matrix = np.empty((n_rows, math.prod(split) // n_rows), kind)
    classes = stream("classes", n_rows, "int8")
    for number in range(sum(name.startswith("codes ") for name in parts)):
        chosen = classes == number
        matrix[chosen] = stream(f"codes {number}", matrix[chosen].size, kind).reshape(-1, matrix.shape[1])
    order = [*rows, *(i for i in range(len(split)) if i not in rows)]
    return matrix.reshape([split[i] for i in order]).transpose(np.argsort(order))


def steps(entry: dict[str, Any], parts: dict[str, bytes], name: str, count: int) -> Array:
    """The steps of a grid's rows, or the scales of its columns."""
    part = entry["parts"][name]
    if "base" not in part:
        return plain(parts[name], "float32")
    differences = decode(parts[name], part.get("coding"), count, "int8").astype(np.int32)
    index = np.where(differences == -128, 0, part["base"] + differences)
    return np.where(differences == -128, np.float32(0), np.ldexp(OCTAVE[index % 8], index // 8))


def step_type(entry: dict[str, Any]) -> str:
    """The type of the steps of groups."""
    return str(entry["format"].get("step", "float16"))


def group_shape(entry: dict[str, Any], name: str) -> tuple[int, int]:
    """The rows of a tensor with groups, and what a part has for each: a number for each group, or each shared one."""
    split, rows = view_of(entry)
    columns = math.prod(size for i, size in enumerate(split) if i not in rows)
    groups = -(-columns // entry["format"]["group"]) if entry["format"]["group"] else 1
    shared = -(-groups // entry["format"].get("nested", 1))
    return math.prod(split[i] for i in rows), shared if name in ("step", "least") else groups


def grouped(entry: dict[str, Any], parts: dict[str, bytes]) -> Array:
    """A tensor with a step for each group of columns, in the shape of its view."""
    fields, (split, rows) = entry["format"], view_of(entry)

    def part(name: str) -> Array:
        coding, shape = entry["parts"][name].get("coding"), group_shape(entry, name)
        if name not in ("step", "least"):
            found = decode(parts[name], coding, math.prod(shape), "int8")
            return (found if name == "zero" or fields.get("signed") else found.view(np.uint8)).reshape(shape)
        if step_type(entry) == "float32":
            return plain(parts[name], "float32").reshape(shape)
        bits = decode(parts[name], coding, math.prod(shape), "int16") + np.int16(entry["parts"][name].get("base", 0))
        return plain(bits.astype("<i2").tobytes(), step_type(entry)).astype(np.float32).reshape(shape)

    def of_columns(name: str, multiple: str = "") -> Array:
        values = part(name)
        if multiple in parts:
            values = values[:, np.arange(group_shape(entry, multiple)[1]) // fields["nested"]] * part(multiple)
        return values[:, np.arange(matrix.shape[1]) // (fields["group"] or max(matrix.shape[1], 1))]

    order = [*rows, *(i for i in range(len(split)) if i not in rows)]
    moved = codes(entry, parts).transpose(order)
    columns = math.prod(moved.shape[len(rows) :])
    matrix = moved.reshape(group_shape(entry, "step")[0], columns).astype(np.float32)
    if "zero" in parts:
        values = (matrix - of_columns("zero")) * of_columns("step", "multiple")
    elif "least" in parts:
        raised = (matrix + 2 ** (fields["bits"] - 1)) * of_columns("step", "multiple")
        values = raised + of_columns("least", "least multiple")
    else:
        values = matrix * of_columns("step", "multiple")
    return values.astype(np.float32).reshape(moved.shape).transpose(np.argsort(order))


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
