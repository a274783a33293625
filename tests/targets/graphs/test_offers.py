"""The bytes that a file of a graph takes for each format that its runtime executes, and codes side by side in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from pared.targets.graphs import onnx, openvino
from pared.targets.graphs.packing import packed, unpacked
from pared.targets.target import Offer, Target

CASES = [(target, offer) for target in (onnx.TARGET, openvino.TARGET) for offer in target.offers]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 2, count)).astype(np.uint8)
    held = packed(codes, bits)
    assert held.shape == (3, 2, -(-count * bits // 8))
    assert np.array_equal(unpacked(held, bits, count), codes)


@pytest.mark.parametrize(("target", "offer"), CASES, ids=lambda one: one.name)
def test_bytes_are_those_of_the_numbers(target: Target, offer: Offer) -> None:
    assert not isinstance(offer.grid, str)
    rows, columns = 6, 1024  # no padding
    more = rows * (target.name == "onnx" and offer.grid.group is None)  # the zero points of rows, int8
    assert offer.nbytes(rows, columns) == offer.grid.nbits(rows, columns) // 8 + more
    assert columns % offer.multiple == 0


@pytest.mark.parametrize("target", [onnx.TARGET, openvino.TARGET], ids=lambda one: one.name)
def test_names_differ_and_every_role_has_offers(target: Target) -> None:
    assert len({offer.name for offer in target.offers}) == len(target.offers)
    assert all(target.offers_for("linear", columns) for columns in (384, 100, 75))
    assert [offer.grid for offer in target.offers_for("other", 27)] == [
        offer.grid for offer in target.offers if offer.name.endswith("8 row")
    ]


def test_a_row_of_onnx_has_whole_groups() -> None:
    by_name = {offer.name: offer for offer in onnx.TARGET.offers}
    assert by_name["int4 g32"].nbytes(5, 100) == 5 * (128 // 2 + 2 * 4)
    assert by_name["int4 g32 zero"].nbytes(5, 100) == 5 * (128 // 2 + 2 * 4 + 2)
    assert not by_name["int4 g32"].takes("linear", 75)  # a table's row would end within a byte


def test_groups_of_openvino_have_no_rest() -> None:
    by_name = {offer.name: offer for offer in openvino.TARGET.offers}
    assert not by_name["i4 g32"].takes("linear", 100)
    assert by_name["i4 row"].nbytes(5, 6) == 15 + 10
    assert {name.split()[0] for name in by_name} == {"i8", "i4", "u4", "u2"}
