"""How long forms take: which runs count, and how many there are."""

import time
from functools import partial

import pytest

from pared.runtime.stopwatch import fastest_ms


@pytest.mark.parametrize(("in_a_row", "small"), [(True, 0.5), (False, 1.1)])
def test_short_runs_are_as_fast_as_in_a_row(monkeypatch: pytest.MonkeyPatch, in_a_row: bool, small: float) -> None:
    """Each run after one of another form takes longer, as its code and numbers have left the caches."""
    clock, last = [0.0], [""]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def run(name: str, warm: float, cold: float) -> None:
        clock[0] += warm if last[0] == name else cold
        last[0] = name

    usual = {"small": (0.0005, 0.0011), "steady": (0.0008, 0.0008)}
    times = fastest_ms({name: partial(run, name, *one) for name, one in usual.items()}, in_a_row=in_a_row)
    assert times == {"small": pytest.approx(small), "steady": pytest.approx(0.8)}


@pytest.mark.parametrize("disturbed", [1, 2])
def test_one_disturbed_run_decides_nothing(monkeypatch: pytest.MonkeyPatch, disturbed: int) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    runs = {"fast": 0, "slow": 0}

    def run(name: str, usual: float) -> None:
        runs[name] += 1
        clock[0] += 0.5 if (name, runs[name]) == ("fast", disturbed) else usual

    times = fastest_ms({name: partial(run, name, usual) for name, usual in (("fast", 0.01), ("slow", 0.02))})
    assert times == {"fast": pytest.approx(10.0), "slow": pytest.approx(20.0)}
    assert max(runs.values()) == 4, "what is slower after a few runs is not timed to the end, nor is what is left"


def test_what_takes_long_and_what_is_hopeless_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    runs = {"fast": 0, "slow": 0}

    def run(name: str, usual: float) -> None:
        runs[name] += 1
        clock[0] += usual

    def times(**usual: float) -> dict[str, float]:
        runs.update(fast=0, slow=0)
        return fastest_ms({name: partial(run, name, seconds) for name, seconds in usual.items()})

    assert times(fast=0.3, slow=0.4) == {"fast": pytest.approx(300.0), "slow": pytest.approx(400.0)}
    assert runs == {"fast": 2, "slow": 2}, "both together have taken more than a second"
    assert times(fast=0.01, slow=0.1) == {"fast": pytest.approx(10.0), "slow": pytest.approx(100.0)}
    assert runs["slow"] == 2 < runs["fast"], "ten times as slow is hopeless"


def test_long_runs_that_came_before_need_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    usual = {"slow": 1.2, "packed": 0.4, "fast": 0.2, "equal": 0.21}
    runs = dict.fromkeys(usual, 0)

    def run(name: str) -> None:
        runs[name] += 1
        clock[0] += usual[name]

    known = {"slow": 1.25, "packed": float("inf"), "equal": 0.25}
    times = fastest_ms({name: partial(run, name) for name in usual}, known)
    assert times == {name: pytest.approx(1e3 * ms) for name, ms in {**usual, "slow": 1.25}.items()}
    assert runs == {"slow": 0, "packed": 1, "fast": 2, "equal": 1}


def test_what_other_processes_were_given_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, processor = [0.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: processor[0])
    waits = iter([9, 30, 40, 10, 60, 10, 50, 10, 20, 10] * 100)  # hundredths of a second; the fast one waits longest

    def run(usual: float) -> None:
        clock[0] += usual + next(waits) / 100
        processor[0] += usual

    times = fastest_ms({name: partial(run, usual) for name, usual in (("fast", 0.01), ("slow", 0.012))})
    assert times == {"fast": pytest.approx(10.0), "slow": pytest.approx(12.0)}
    assert clock[0] > 1.0, "measured for longer than on an idle machine"
