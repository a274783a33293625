import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.fitting.rounding.nearest import absmax_steps, nearest
from pared.formats import entropy
from pared.formats.coded import Coded
from pared.formats.views import View


def matrix(rows: int = 256, columns: int = 512, spread: float = 0.5) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=g) * torch.exp(spread * torch.randn(rows, 1, generator=g))


def rate(coded: Coded) -> float:
    codes = coded.parts["codes"].numpy()
    return 8 * entropy.cost(codes) / codes.size


ROWS = View((256, 512), (0,))


@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4, 5.5, 6.5, 9, 10, 11, 12])
def test_the_rate_asked_for_is_the_rate_in_the_file(bits: float) -> None:
    assert abs(rate(nearest(matrix(), bits, ROWS)) - bits) < 0.06


def test_eight_bits_is_plain_int8_per_row() -> None:
    w = matrix()
    coded = nearest(w, 8, ROWS)
    assert torch.equal(coded.parts["step"], w.abs().amax(1) / 127)
    assert torch.equal(coded.parts["codes"].abs().amax(1), torch.full((256,), 127, dtype=torch.int8))


@pytest.mark.parametrize(("bits", "codes"), [(2, torch.int8), (8, torch.int8), (8.5, torch.int16), (12, torch.int16)])
def test_codes_are_int8_up_to_eight_bits(bits: float, codes: torch.dtype) -> None:
    assert nearest(matrix(), bits, ROWS).parts["codes"].dtype == codes


def test_more_bits_never_hurt() -> None:
    w = matrix()
    errors = [float((nearest(w, bits, ROWS).decode() - w).square().sum()) for bits in (1, 2, 3, 4, 6, 8, 9, 11, 13)]
    assert errors == sorted(errors, reverse=True)


def test_a_monster_in_one_row_does_not_coarsen_the_others() -> None:
    w = matrix(spread=0.0)
    plain = nearest(w, 4, ROWS).decode()
    w[3, 7] = 175.0
    coded = nearest(w, 4, ROWS)
    assert coded.parts["codes"].abs().max() <= 127
    assert abs(coded.decode()[3, 7] - 175.0) < 1.0
    others = torch.arange(256) != 3
    before, after = (plain - matrix(spread=0.0))[others], (coded.decode() - w)[others]
    assert after.square().sum() < 1.2 * before.square().sum()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.5, 2, 8, 12]), st.integers(0, 2**16))
def test_small_and_odd_matrices(rows: int, columns: int, bits: float, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    coded = nearest(w, bits, View((rows, columns), (0,)))
    assert coded.decode().shape == w.shape
    assert bool(torch.isfinite(coded.decode()).all())


def test_zeros_and_constants() -> None:
    for w in (torch.zeros(4, 8), torch.full((4, 8), 3.0), torch.full((4, 8), 1e-42)):
        decoded = nearest(w, 3, View((4, 8), (0,))).decode()
        assert bool(torch.isfinite(decoded).all())
        assert float((decoded - w).abs().max()) <= 3.0 * 0.51


def test_a_single_row_has_a_single_step() -> None:
    w = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    steps = absmax_steps(w, View((64, 1), ()), 127)
    assert steps.shape == ()
    assert steps == w.abs().max() / 127
