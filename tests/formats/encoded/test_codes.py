"""Codes that stay bytes: whole or by rows they are what they were; rows take no chunks but those that they stand in."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pared.formats import entropy
from pared.formats.encoded.codes import EncodedCodes, Undecoded, with_steps
from pared.formats.encoded.rows import decode_rows
from pared.formats.entropy import Codes
from pared.formats.streams import encode_codes
from pared.formats.views import View

SHAPE = (3000, 50)  # some chunks, and rows that lie across their ends
VIEWS = (View(SHAPE, (0,)), View(SHAPE, (1,)), View(SHAPE, ()), View((3000, 5, 10), (0, 1)))


def codes_of(kind: str, spread: str) -> Codes:
    """Codes whose rows and columns have spreads of their own ("classes"), or that are of one distribution, or equal."""
    generator = np.random.default_rng(0)
    if spread == "equal":
        return np.full(SHAPE, 3, kind)
    if spread == "plain":  # all values alike: no shorter than themselves
        limits = np.iinfo(kind)
        return generator.integers(limits.min, limits.max, SHAPE, endpoint=True).astype(kind)
    scale = (
        np.exp(generator.normal(0, 1, (SHAPE[0], 1)) + generator.normal(0, 1, SHAPE[1])) if spread == "classes" else 2
    )
    return np.clip(np.round(generator.normal(0, scale, SHAPE)), -120, 120).astype(kind)


@pytest.mark.parametrize("spread", ["classes", "one", "equal", "plain"])
@pytest.mark.parametrize("kind", ["int8", "int16"])
@pytest.mark.parametrize("view", VIEWS)
def test_rows_are_those_of_the_whole(view: View, kind: str, spread: str) -> None:
    codes = codes_of(kind, spread)
    parts = encode_codes(codes, view)
    encoded = EncodedCodes(parts, SHAPE, view, getattr(torch, kind))
    assert torch.equal(encoded.decode(), torch.from_numpy(codes))
    for indices in (
        torch.tensor([7]),
        torch.tensor([[2999, 0], [1300, 0]]),
        torch.arange(3000),
        torch.tensor([], dtype=torch.long),
    ):
        assert torch.equal(encoded.rows(indices), F.embedding(indices, torch.from_numpy(codes)))
    assert encoded.nbytes == sum(len(part.payload) for part in parts.values())


def test_a_row_decodes_the_chunks_in_which_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    view, codes = VIEWS[0], codes_of("int8", "one")
    parts = encode_codes(codes, view)
    span = parts["codes"].coding.span if parts["codes"].coding is not None else 0
    assert span < codes.size
    across = span // SHAPE[1]  # the row that begins in the first chunk and ends in the second
    decoded: list[int] = []
    plain = entropy.decode

    def counted(*arguments: Any, **options: Any) -> Codes:
        decoded.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(entropy, "decode", counted)
    for rows, chunks in (([0, 3], 1), ([across], 2), ([2999], 1)):
        decoded.clear()
        found = decode_rows(parts, SHAPE, view, "int8", np.array(rows), threads=1)
        assert (len(decoded), found.tolist()) == (chunks, codes[rows].tolist())


def test_rows_that_are_not_there() -> None:
    encoded = EncodedCodes(encode_codes(codes_of("int8", "one"), VIEWS[0]), SHAPE, VIEWS[0], torch.int8)
    for index in (-1, 3000):
        with pytest.raises(IndexError, match="index out of range in self"):
            encoded.rows(torch.tensor([0, index]))


def test_copies_share_bytes_and_nothing_else() -> None:
    codes = torch.from_numpy(codes_of("int8", "classes"))
    encoded = EncodedCodes(encode_codes(codes.numpy(), VIEWS[0]), SHAPE, VIEWS[0], torch.int8)
    held = encoded.decode()
    assert encoded.decode() is held  # as long as someone holds it
    clone, again = copy.deepcopy(encoded), pickle.loads(pickle.dumps(encoded))
    assert clone.streams["codes 0"].payload is encoded.streams["codes 0"].payload
    encoded.take(-codes)
    assert torch.equal(encoded.decode(), -codes)
    assert torch.equal(clone.decode(), codes)
    assert torch.equal(again.decode(), codes)


def test_the_parts_of_a_grid() -> None:
    codes = torch.from_numpy(codes_of("int8", "one"))
    steps = {"step": torch.ones(3000)}
    parts = Undecoded.of({"codes": codes, **steps}, encode_codes(codes.numpy(), VIEWS[0]), VIEWS[0])
    assert (list(parts), len(parts)) == (["codes", "step"], 2)
    assert torch.equal(parts["codes"], codes)
    other = {"step": torch.zeros(3000), "scale": torch.ones(50)}
    again, plain = with_steps(parts, other), with_steps({"codes": codes, **steps}, other)
    assert isinstance(again, Undecoded)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
