"""How files are damaged: bits, cuts, inserts, doubled blocks, extreme numbers; half of all archives with right sums."""

import io
import struct
import zipfile
from random import Random

EXTREMES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def damaged(file: bytes, random: Random) -> bytes:
    """The file after one to four damages; inside a member and packed again in half of the archives."""
    if file.startswith(b"PK") and random.random() < 0.5:
        return _packed_again(file, random)
    if file[8:9] == b"{" and random.random() < 0.5:
        return _header_again(file, random)
    return _damaged(file, random)


def _damaged(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    for _ in range(random.randint(1, 4)):
        random.choice(DAMAGES)(data, random)
    return bytes(data)


def _flip(data: bytearray, random: Random) -> None:
    for _ in range(random.randint(1, 8)):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _cut(data: bytearray, random: Random) -> None:
    begin = random.randrange(len(data) + 1)
    del data[begin : begin + random.randint(1, 40)]


def _end(data: bytearray, random: Random) -> None:
    if random.random() < 0.3:
        del data[random.randrange(len(data) + 1) :]


def _insert(data: bytearray, random: Random) -> None:
    begin = random.randrange(len(data) + 1)
    data[begin:begin] = random.randbytes(random.randint(1, 16))


def _double(data: bytearray, random: Random) -> None:
    begin = random.randrange(len(data) + 1)
    block = data[begin : begin + random.randint(1, 200)]
    place = random.randrange(len(data) + 1)
    data[place:place] = block * random.randint(1, 3)


def _swap(data: bytearray, random: Random) -> None:
    begin, place = (random.randrange(len(data) + 1) for _ in range(2))
    block = data[begin : begin + random.randint(1, 32)]
    data[place : place + len(block)] = block


def _extreme(data: bytearray, random: Random) -> None:
    code = random.choice("BHIQ")
    number = random.choice(EXTREMES) & ((1 << 8 * struct.calcsize(code)) - 1)
    begin = random.randrange(len(data) + 1)
    packed = struct.pack(random.choice("<>") + code, number)
    data[begin : begin + len(packed)] = packed


DAMAGES = (_flip, _cut, _end, _insert, _double, _swap, _extreme)


def _packed_again(file: bytes, random: Random) -> bytes:
    """One or two members damaged, and the archive written anew, so that its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    # Mostly what describes the rest; numbers may be anything.
    described = [i for i, (info, _) in enumerate(members) if info.filename.endswith((".pkl", ".json", ".npy", "/0"))]
    chosen = {random.choice(described or range(len(members))), random.randrange(len(members))}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, (info, content) in enumerate(members):
            new = _damaged(content, random) if i in chosen else content
            archive.writestr(info.filename, new, info.compress_type)
    return stream.getvalue()


def _header_again(file: bytes, random: Random) -> bytes:
    """The header of a .safetensors file damaged, and its length right."""
    (length,) = struct.unpack_from("<Q", file)
    header = _damaged(file[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]
