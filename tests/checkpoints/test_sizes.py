"""`pared compress` within a size: it is kept, used, and spent where it counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pared
from pared import readers
from pared.checkpoints.sampling import predict_nbytes
from pared.errors import ConfigError
from tests.checkpoints.states import drawn, layers, saved, there_and_back
from tests.ratios import snr


@pytest.mark.parametrize("share", [0.05, 0.1, 0.125, 0.2, 0.3])
@pytest.mark.slow
def test_a_size_is_kept_and_used(share: float, tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    size = int(share * source.stat().st_size)
    found = pared.compress(source, tmp_path / "out", max_size=size).stat().st_size
    assert size - 4096 < found <= size


def test_a_size_is_spent_where_it_counts(tmp_path: Path) -> None:
    """The errors are the same share of energy for each weight of every tensor: large tensors bear more of them."""
    source = layers()
    found = there_and_back(source, tmp_path, max_size="60KB")
    shares = [10 ** (-snr(source[name], found[name]) / 10) / source[name].numel() for name in source]
    assert max(shares) < 1.2 * min(shares)


def test_a_size_with_a_unit(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    assert pared.compress(source, tmp_path / "out", max_size="100KiB").stat().st_size <= 102_400


def test_an_impossible_size_says_which_is_possible(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    with pytest.raises(ConfigError, match=r"max_size: 1,000 bytes are too few: with all weights at zero"):
        pared.compress(source, tmp_path / "out", max_size=1000)


@pytest.mark.parametrize("bits", [3, 4, 8, 12, 16])
def test_what_is_predicted_is_what_it_takes(bits: float, tmp_path: Path) -> None:
    state = layers() | {"large": drawn(900, 1000), "bias": drawn(500), "n": torch.arange(9)}
    source = saved(state, tmp_path / "m.pt")
    with readers.open_listing(source) as listing:
        predicted = predict_nbytes(listing, bits)
    taken = pared.compress(source, tmp_path / "out", bits=bits).stat().st_size
    assert abs(predicted / taken - 1) < 0.03


@pytest.mark.parametrize("scale", [1e36, 1e-30])
def test_very_large_and_very_small_numbers_fit_a_size(scale: float, tmp_path: Path) -> None:
    source = {"few rows": drawn(8, 3000) * scale, "rows": drawn(40, 300) * scale}
    for size in (4500, 30_000):
        found = there_and_back(source, tmp_path, max_size=size)
        for name, tensor in source.items():
            assert snr(tensor / scale, found[name] / scale) > (0 if size == 4500 else 33)
