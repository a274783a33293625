"""Codes, and a tensor of them for each way of coding."""

import numpy as np

from pared.formats.entropy import CHUNK, Codes, Coding


def draw(distribution: str, step: float, size: int, dtype: str) -> Codes:
    """Codes of values with unit variance on a grid of that step."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=size) if distribution == "gauss" else rng.laplace(size=size) / 2**0.5
    limit = int(np.iinfo(dtype).max)
    return np.round(values / step).clip(-limit, limit).astype(dtype)


def wild(codes: Codes, share: float = 0.001) -> Codes:
    """The same codes, a few of them replaced by any value of their type."""
    rng = np.random.default_rng(1)
    limits = np.iinfo(codes.dtype)
    anything = rng.integers(limits.min, limits.max + 1, codes.size).astype(codes.dtype)
    mixed: Codes = np.where(rng.random(codes.size) < share, anything, codes)
    return mixed


# One tensor for each way of coding, of several chunks, the last one odd; with any value of the type here and there.
LAYOUTS = {
    "int8, one": (Coding(1), wild(draw("gauss", 0.1, 2 * CHUNK + 1, "int8"))),
    "int8, two": (Coding(2), wild(draw("gauss", 0.7, 4 * CHUNK + 1, "int8"))),
    "int8, three": (Coding(3), wild(draw("gauss", 1.8, 3 * CHUNK + 2, "int8"))),
    "int8, four": (Coding(4), wild(draw("gauss", 2.9, 5 * CHUNK + 3, "int8"), 1e-4)),
    "int8, two and four bits": (Coding(2, 4), wild(draw("gauss", 0.03, 3 * CHUNK, "int8")[:-1])),
    "int16, one": (Coding(1), wild(draw("gauss", 0.1, 2 * CHUNK + 5, "int16"))),
    "int16, two": (Coding(2), wild(draw("gauss", 0.7, 4 * CHUNK + 1, "int16"))),
    "int16, three": (Coding(3), wild(draw("gauss", 1.8, 3 * CHUNK + 2, "int16"))),
    "int16, four": (Coding(4), wild(draw("gauss", 2.9, 5 * CHUNK + 3, "int16"), 1e-4)),
    "int16, one and four bits": (Coding(1, 4), wild(draw("gauss", 0.003, 2 * CHUNK + 7, "int16"))),
    "int16, one and eight bits": (Coding(1, 8), wild(draw("gauss", 0.0003, 2 * CHUNK + 7, "int16"), 0.01)),
    "int16, two and eight bits": (Coding(2, 8), wild(draw("gauss", 0.002, 3 * CHUNK + 1, "int16"))),
    "int8, constant": (Coding(constant=-128), np.full(CHUNK + 1, -128, "int8")),
    "int16, constant": (Coding(constant=32767), np.full(7, 32767, "int16")),
    "int8, plain": (None, np.random.default_rng(0).integers(-128, 128, 5000).astype("int8")),
    "int16, plain": (None, np.random.default_rng(0).integers(-32768, 32768, 5000).astype("int16")),
    "int8, empty": (None, np.empty(0, "int8")),
}
