"""Every block type decodes, by the runtime's own library, to what its grid says: bit for bit."""

import gguf
import numpy as np
import pytest

from pared.targets.gguf.blocks import BLOCKS
from pared.targets.gguf.target import TARGET
from pared.targets.table import TARGETS
from tests.targets.grids import random_parts


@pytest.mark.parametrize("name", BLOCKS)
def test_the_library_decodes_what_the_grid_says(name: str) -> None:
    block = BLOCKS[name]
    parts = random_parts(block.grid, 5, 768)
    packed = block.pack(parts)
    read = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    assert np.array_equal(read.view(np.uint32), block.grid.decode(parts).view(np.uint32))


@pytest.mark.parametrize("offer", TARGET.offers, ids=lambda offer: offer.name)
def test_bytes_are_those_of_the_library(offer) -> None:  # type: ignore[no-untyped-def]  # pytest's parameter
    columns, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[offer.name]]
    assert offer.multiple in (1, columns)
    assert offer.nbytes(64, 768) == 64 * 768 // columns * nbytes


def test_each_tensor_is_padded() -> None:
    (offer,) = (offer for offer in TARGET.offers if offer.name == "Q4_0")
    assert offer.nbytes(1, 32) == 32  # of which 18 are its own


def test_widths_decide_what_is_offered() -> None:
    assert TARGETS["gguf"] is TARGET
    names = [offer.name for offer in TARGET.offers_for("linear", 576)]
    assert names == ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    assert [offer.name for offer in TARGET.offers_for("head", 100)] == ["F32", "F16", "BF16"]
    assert TARGET.offers_for("other", 256) == ()
