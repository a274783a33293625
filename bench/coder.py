"""The entropy coder beside memcpy and zstandard's best, from 12 bits a code down to 1.

    python bench/coder.py [--codes 4194304] [--repeats 9] [--json FILE]

Codes are values of a normal distribution on a grid. Speeds are millions of codes per second of one core:
medians of processor time, so that other work on the machine counts less; it still takes cache and clock, so the
best run is judged too.
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

from pared.formats import entropy

RATES = (12, 11, 10, 9, 8, 7.3, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1)
INT8_UP_TO = 7.3  # beyond, int8 codes would be clipped
BEST = zstandard.ZstdCompressor(level=19)
ZSTD_CODES = 1 << 19  # zstandard's best is too slow for more


@dataclass(frozen=True)
class Row:
    """One rate: bits per code, and millions of codes per second (median; "best" is the fastest run)."""

    codes: str
    entropy: float
    rate: float
    per_symbol: int
    low_bits: int
    encode: float
    encode_best: float
    decode: float
    decode_best: float
    memcpy: float
    zstd_rate: float
    zstd_encode: float
    zstd_decode: float

    @property
    def gap(self) -> float:
        return self.rate - self.entropy


def main() -> None:
    options = parse()
    values = np.random.default_rng(0).normal(size=options.codes)
    versions = f"Python {platform.python_version()}, zlib {zlib.ZLIB_RUNTIME_VERSION}, zstandard level 19"
    print(f"{platform.machine()}, {versions}; {options.codes:,} codes, median of {options.repeats}")
    print("M codes/s per core; layout: codes per symbol + low bits\n")
    print("codes  entropy    rate     gap  layout  encode (best)  decode (best)  memcpy | zstd: rate encode decode")
    rows = []
    for bits in RATES:
        row = measure(values, bits, options.repeats)
        rows.append(row)
        print(
            f"{row.codes:5}  {row.entropy:7.3f} {row.rate:7.3f}  {row.gap:+6.3f}  {row.per_symbol} + {row.low_bits}"
            f"   {row.encode:6.0f} ({row.encode_best:4.0f})  {row.decode:6.0f} ({row.decode_best:4.0f})"
            f"  {row.memcpy:6.0f} | {row.zstd_rate:10.3f} {row.zstd_encode:6.1f} {row.zstd_decode:6.0f}"
        )
    int8 = [row for row in rows if row.codes == "int8"]
    print(
        "\nslowest at int8, median (best): "
        f"encode {min(row.encode for row in int8):.0f} ({min(row.encode_best for row in int8):.0f}), target 150; "
        f"decode {min(row.decode for row in int8):.0f} ({min(row.decode_best for row in int8):.0f}), target 250"
    )
    print(f"largest gap to the entropy: {max(row.gap for row in rows):.3f} bit, target 0.15")
    if options.json:
        report = {"machine": platform.machine(), "versions": versions, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The entropy coder beside memcpy and zstandard's best.")
    parser.add_argument("--codes", type=int, default=1 << 22, help="codes per rate")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of which the median counts")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def measure(values: np.ndarray, bits: float, repeats: int) -> Row:
    dtype = np.int8 if bits <= INT8_UP_TO else np.int16
    codes = at_rate(values, bits, dtype)
    stream = entropy.encode(codes, threads=1)
    coding = stream.coding or entropy.Coding()
    sample = codes[:ZSTD_CODES].tobytes()
    packed = BEST.compress(sample)
    zstd_codes = len(sample) // codes.itemsize

    def decode() -> None:
        entropy.decode(stream.payload, stream.coding, codes.size, dtype, threads=1)

    encode_speed = speed(lambda: entropy.encode(codes, threads=1), codes.size, repeats)
    decode_speed = speed(decode, codes.size, repeats)
    zstd_decode = speed(lambda: zstandard.ZstdDecompressor().decompress(packed), zstd_codes, repeats)
    return Row(
        codes=np.dtype(dtype).name,
        entropy=entropy.entropy(codes),
        rate=8 * len(stream.payload) / codes.size,
        per_symbol=coding.per_symbol,
        low_bits=coding.low_bits,
        encode=encode_speed[0],
        encode_best=encode_speed[1],
        decode=decode_speed[0],
        decode_best=decode_speed[1],
        memcpy=speed(codes.copy, codes.size, repeats)[0],
        zstd_rate=8 * len(packed) / zstd_codes,
        zstd_encode=speed(lambda: BEST.compress(sample), zstd_codes, 1)[0],
        zstd_decode=zstd_decode[0],
    )


def at_rate(values: np.ndarray, bits: float, dtype: type[np.signedinteger]) -> entropy.Codes:
    """The values on the grid on which the entropy of their codes is `bits`."""
    low, high = 1e-4, 10.0
    for _ in range(20):
        step = (low * high) ** 0.5
        part = np.round(values[: 1 << 18] / step).clip(-32767, 32767).astype(np.int16)
        low, high = (step, high) if entropy.entropy(part) > bits else (low, step)
    limit = np.iinfo(dtype).max
    codes: entropy.Codes = np.round(values / step).clip(-limit, limit).astype(dtype)
    return codes


def speed(work: Callable[[], object], codes: int, repeats: int) -> tuple[float, float]:
    """Millions of codes per second of this thread's processor time: median and best."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return codes / statistics.median(times) / 1e6, codes / min(times) / 1e6


if __name__ == "__main__":
    main()
