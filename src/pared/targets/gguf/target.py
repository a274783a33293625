"""What llama.cpp executes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from pared.formats import dtypes
from pared.targets.gguf.blocks import BLOCKS
from pared.targets.target import Offer, Role, Target

ALIGNMENT: Final = 32  # each tensor's bytes begin at a multiple of this

_ROLES: Final[frozenset[Role]] = frozenset(("linear", "table", "head"))
FLOATS: Final[dict[str, Literal["float32", "float16", "bfloat16"]]] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _of_blocks(columns_of_block: int, nbytes: int) -> Callable[[int, int], int]:
    return lambda rows, columns: _padded(rows * columns // columns_of_block * nbytes)


TARGET: Final = Target(
    name="gguf",
    title="GGUF: llama.cpp, Ollama, LM Studio",
    extra="gguf",
    packages=("gguf",),
    by_family=True,
    offers=(
        *(Offer(name, kind, _of_blocks(1, dtypes.ITEM_SIZES[kind]), 1, _ROLES) for name, kind in FLOATS.items()),
        *(
            Offer(
                *(name, block.grid, _of_blocks(block.columns, block.nbytes), block.columns, _ROLES),
                negative=block.grid.zero == "fixed",
            )
            for name, block in BLOCKS.items()
        ),
    ),
)
