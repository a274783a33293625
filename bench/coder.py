"""The entropy coder beside memcpy and zstandard's best, from 12 bits a code down to 1.

    python bench/coder.py [--codes 4194304] [--repeats 9] [--json FILE]

Codes are values of a normal distribution on a grid. Speeds are millions of codes per second of one core: medians
of processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zstandard

from pared import entropy

RATES = (12, 11, 10, 9, 8, 7.3, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1)
INT8_UP_TO = 7.3  # beyond, int8 codes would be clipped
ENCODE_TARGET, DECODE_TARGET, GAP_TARGET = 150, 250, 0.15


@dataclass(frozen=True)
class Row:
    """One rate: bits per code, and millions of codes per second."""

    codes: str
    entropy: float
    rate: float
    coding: dict[str, int]
    encode: float
    decode: float
    memcpy: float
    zstd_rate: float
    zstd_encode: float
    zstd_decode: float


def main() -> None:
    options = parse()
    rng = np.random.default_rng(0)
    values = rng.normal(size=options.codes)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, zlib {zlib.ZLIB_RUNTIME_VERSION},",
        end=" ",
    )
    print(f"zstandard level 19, {options.codes:,} codes, median of {options.repeats}, M codes/s per core\n")
    print("       entropy    rate    gap  per symbol  encode  decode  memcpy | zstd: rate  encode  decode")
    rows = []
    for bits in RATES:
        row = measure(values, bits, options.repeats)
        rows.append(row)
        layout = f"{row.coding['per_symbol']} + {row.coding.get('low_bits', 0)} bits"
        print(
            f"{row.codes:5} {row.entropy:8.3f} {row.rate:7.3f} {row.rate - row.entropy:+6.3f}  {layout:10}"
            f"  {row.encode:6.0f}  {row.decode:6.0f}  {row.memcpy:6.0f} |"
            f" {row.zstd_rate:10.3f}  {row.zstd_encode:6.1f}  {row.zstd_decode:6.0f}"
        )
    int8 = [row for row in rows if row.codes == "int8"]
    print(
        f"\nslowest at int8: encode {min(row.encode for row in int8):.0f} (target {ENCODE_TARGET}), "
        f"decode {min(row.decode for row in int8):.0f} (target {DECODE_TARGET}); "
        f"largest gap {max(row.rate - row.entropy for row in rows):.3f} bit (target {GAP_TARGET})"
    )
    if options.json:
        report = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
            "codes": options.codes,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--codes", type=int, default=1 << 22, help="codes per rate")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of which the median counts")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def measure(values: np.ndarray, bits: float, repeats: int) -> Row:
    dtype = np.int8 if bits <= INT8_UP_TO else np.int16
    codes = at_rate(values, bits, dtype)
    stream = entropy.encode(codes, threads=1)
    coding = stream.coding or entropy.Coding()
    sample = codes[: 1 << 19]  # zstandard's best is too slow for more
    packed = zstandard.ZstdCompressor(level=19).compress(sample)

    def zstd_decode() -> None:
        zstandard.ZstdDecompressor().decompress(packed)

    return Row(
        codes=np.dtype(dtype).name,
        entropy=entropy.entropy(codes),
        rate=8 * len(stream.payload) / codes.size,
        coding=coding.to_json(),
        encode=speed(lambda: entropy.encode(codes, threads=1), codes.size, repeats),
        decode=speed(
            lambda: entropy.decode(stream.payload, stream.coding, codes.size, dtype, threads=1),
            codes.size,
            repeats,
        ),
        memcpy=speed(codes.copy, codes.size, repeats),
        zstd_rate=8 * len(packed) / sample.size,
        zstd_encode=speed(lambda: zstandard.ZstdCompressor(level=19).compress(sample), sample.size, 1),
        zstd_decode=speed(zstd_decode, sample.size, repeats),
    )


def at_rate(values: np.ndarray, bits: float, dtype: type[np.signedinteger]) -> entropy.Codes:
    """The values on the grid at which their codes' entropy is `bits`."""
    low, high = 1e-4, 10.0
    limit = np.iinfo(dtype).max
    for _ in range(20):
        step = (low * high) ** 0.5
        part = np.round(values[: 1 << 18] / step).clip(-32767, 32767).astype(np.int16)
        low, high = (step, high) if entropy.entropy(part) > bits else (low, step)
    return np.round(values / step).clip(-limit, limit).astype(dtype)


def speed(work: Callable[[], object], codes: int, repeats: int) -> float:
    """Millions of codes per second of this thread's processor time."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return codes / statistics.median(times) / 1e6


if __name__ == "__main__":
    main()
