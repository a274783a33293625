"""The allocation: the best choice at each price, and what it promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.allocate import Choice, Options, choose, ends, fill, within_bytes, within_damage

amounts = st.integers(0, 60).map(float)
tables = st.lists(
    st.lists(st.tuples(amounts, amounts), min_size=1, max_size=5).map(
        lambda pairs: Options(np.array([b for b, _ in pairs]), np.array([d for _, d in pairs]))
    ),
    min_size=1,
    max_size=4,
)
prices = st.floats(1e-3, 1e3)


def everything(tensors: list[Options]) -> list[tuple[float, float]]:
    """Bytes and damage of every combination."""
    return [
        (
            sum(float(t.nbytes[o]) for t, o in zip(tensors, chosen, strict=True)),
            sum(float(t.damage[o]) for t, o in zip(tensors, chosen, strict=True)),
        )
        for chosen in itertools.product(*(range(len(t.nbytes)) for t in tensors))
    ]


@given(tables, prices)
@settings(deadline=None)
def test_a_choice_is_the_best_of_all_combinations(tensors: list[Options], price: float) -> None:
    choice = choose(tensors, price)
    combinations = everything(tensors)
    least = min(damage + price * nbytes for nbytes, damage in combinations)
    assert choice.damage + price * choice.nbytes == pytest.approx(least, abs=1e-9)
    assert not any(b <= choice.nbytes and d < choice.damage - 1e-9 for b, d in combinations)
    assert (choice.nbytes, choice.damage) in combinations


@given(tables, st.lists(prices, min_size=2, max_size=8))
@settings(deadline=None)
@pytest.mark.slow
def test_bytes_never_grow_and_damage_never_falls_with_the_price(tensors: list[Options], some: list[float]) -> None:
    choices = [choose(tensors, price) for price in sorted(some)]
    for cheap, dear in itertools.pairwise(choices):
        assert dear.nbytes <= cheap.nbytes
        assert dear.damage >= cheap.damage


def hull(tensors: list[Options]) -> list[Choice]:
    low, high = ends(tensors)
    return [choose(tensors, price) for price in np.geomspace(low, high, 2000)]


@given(tables, st.floats(0, 200))
@settings(deadline=None, max_examples=50)
@pytest.mark.slow
def test_within_bytes_and_within_damage_keep_their_bound(tensors: list[Options], bound: float) -> None:
    found = within_bytes(tensors, bound)
    fitting = [c for c in hull(tensors) if c.nbytes <= bound]
    if fitting:
        assert found.nbytes <= bound
        assert found.damage <= min(c.damage for c in fitting) + 1e-9
    else:
        assert found.nbytes == min(c.nbytes for c in hull(tensors))
    found = within_damage(tensors, bound)
    fitting = [c for c in hull(tensors) if c.damage <= bound]
    if fitting:
        assert found.damage <= bound
        assert found.nbytes <= min(c.nbytes for c in fitting) + 1e-9
    else:
        assert found.damage == min(c.damage for c in hull(tensors))


@given(tables)
@settings(deadline=None)
def test_the_ends_are_the_least_damaging_and_the_smallest(tensors: list[Options]) -> None:
    low, high = (choose(tensors, price) for price in ends(tensors))
    assert low.damage == pytest.approx(sum(float(t.damage.min()) for t in tensors))
    assert high.nbytes == pytest.approx(sum(float(t.nbytes.min()) for t in tensors))


@given(tables, prices, st.floats(0, 200))
@settings(deadline=None)
def test_filling_spends_what_there_is_and_only_gains(tensors: list[Options], price: float, extra: float) -> None:
    choice = choose(tensors, price)
    bound = choice.nbytes + extra
    found = fill(tensors, choice, bound)
    assert found.nbytes <= bound + 1e-9
    assert found.damage <= choice.damage + 1e-9
    pairs = list(zip(tensors, found.options, strict=True))
    assert found.nbytes == pytest.approx(sum(float(t.nbytes[o]) for t, o in pairs))
    left = bound - found.nbytes
    assert not any(((t.nbytes - t.nbytes[o] <= left - 1e-9) & (t.damage < t.damage[o] - 1e-9)).any() for t, o in pairs)
