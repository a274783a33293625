"""How many threads work on calls that `fit` makes: one where steps are small, and else as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.fitting.timing.threads import suited, takes_small_steps, timed_with
from pared.model.calls import Call
from pared.runtime.profile.profile import this_machine
from pared.runtime.stopwatch import Spent
from pared.switches import threads, threads_asked

ASKED = 3


@pytest.fixture(autouse=True)
def asked() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(ASKED)
    yield
    assert torch.get_num_threads() == ASKED, "no call changes it"
    torch.set_num_threads(before)


def elsewhere() -> int:
    """The number of threads for a thread that has not computed yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_fewer_threads_are_for_this_thread_alone_and_for_a_while() -> None:
    with threads(1):
        assert (torch.get_num_threads(), threads_asked(), elsewhere()) == (1, ASKED, ASKED)
        assert this_machine()["threads"] == ASKED
        with threads(threads_asked()):
            assert (torch.get_num_threads(), threads_asked()) == (ASKED, ASKED)
        assert (torch.get_num_threads(), elsewhere()) == (1, ASKED)
    assert (torch.get_num_threads(), threads_asked(), elsewhere()) == (ASKED, ASKED, ASKED)
    with pytest.raises(KeyError), threads(1):
        raise KeyError
    assert torch.get_num_threads() == ASKED


class Counting(nn.Module):
    """A recurrent model that notes how many threads each call has."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.first = nn.GRU(8, 8, batch_first=True) if recurrent else nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        y = self.first(x)
        out: Tensor = self.last(y[0] if isinstance(y, tuple) else y)
        return out


seen: list[int] = []


@pytest.mark.parametrize(("recurrent", "expected"), [(True, 1), (False, ASKED)])
def test_steps_of_recurrent_layers_are_small(recurrent: bool, expected: int) -> None:
    model = Counting(recurrent)
    assert takes_small_steps(model) == recurrent
    with suited(model):
        assert torch.get_num_threads() == expected
    with suited("no model"):
        assert torch.get_num_threads() == ASKED


@pytest.mark.parametrize(("busy", "expected"), [(True, 1), (False, ASKED)])
def test_calls_are_timed_with_one_thread_only_while_others_are_at_work(
    busy: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spent, "is_disturbed", property(lambda _: busy))
    model, call = Counting(recurrent=True), Call((torch.randn(1, 2, 8),), {})
    with suited(model), timed_with(model, call):
        assert torch.get_num_threads() == expected
    seen.clear()
    with timed_with(model, call):
        assert (torch.get_num_threads(), seen) == (ASKED, []), "nothing has to be found out"


@pytest.mark.slow
def test_a_score_is_taken_with_the_threads_that_were_asked_for() -> None:
    found: list[int] = []

    def score(model: Any) -> float:
        found.append(torch.get_num_threads())
        return 1.0

    seen.clear()
    conf = PostTrainingQuantConfig(approach="weight_only", max_trials=1)
    q = pared.fit(Counting(recurrent=True).eval(), conf, [torch.randn(2, 3, 8) for _ in range(4)], score)
    assert set(found) == {ASKED}
    assert seen[0] == 1, "calibration"
    assert q.pared.damage is not None
