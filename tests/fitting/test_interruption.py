"""Ctrl-C at any stage of `fit`: the best so far, or what the caller expects, and a model that is whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.artifact.outcome import Curve
from pared.fitting import speed
from pared.fitting.search import search, trade_off
from pared.fitting.search.compressor import Compressor
from pared.fitting.search.strategy.strategy import Strategy
from pared.fitting.search.workspace import Workspace
from pared.runtime import quantized
from pared.terminal import Stages
from tests.fitting.small_network import BATCHES, MODEL, X, build, conf, lost

pytestmark = pytest.mark.slow  # almost every test here fits a whole model


def interrupting(function: Any, place: int) -> Any:
    """The function, during whose call of this number the user presses Ctrl-C."""
    calls: list[Any] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == place:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def assert_is_whole(q: Any, tmp_path: Path) -> None:
    """It is the best of the trials, says so, and can be saved and loaded."""
    assert len(q.trials) >= 1
    assert q.score in [trial.score for trial in q.trials]
    scores = [point.score for point in q.curve().points if point.score is not None]
    assert sorted(scores) == sorted(trial.score for trial in q.trials)
    loaded = pared.load(pared.save(q, tmp_path), model=build())
    with torch.no_grad():
        assert torch.equal(loaded(X), q(X))


# Where the user presses Ctrl-C: an attribute, the number of its call, and what is logged.
STAGES: dict[str, tuple[Any, str, int, str]] = {
    "building": (Compressor, "build", 3, "the best of 1 trials is returned"),
    "counting bytes": (quantized, "nbytes", 2, "the best of 1 trials is returned"),
    "recording the first": (Workspace, "add", 1, "the best of 1 trials is returned"),
    "logging the first": (search.log, "info", 1, "the best of 1 trials is returned"),
    "choosing": (Strategy, "next", 2, "the best of 1 trials is returned"),
    "naming contributors": (
        Compressor,
        "contributors",
        1,
        "the largest contributors to the damage were not determined",
    ),
    "tracing, at once": (trade_off, "trace", 1, "without its remaining measurements"),
    "timing layers": (speed, "time_layers", 1, "without its remaining measurements"),
    "timing models": (speed, "time_calls", 1, "without its remaining measurements"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_any_stage_after_a_trial_returns_the_best_so_far(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, place, said = STAGES[stage]
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), place))
    loss = 0.0 if stage == "naming contributors" else 1e-3  # what is met has no largest contributors
    q = pared.fit(MODEL, conf(loss, max_trials=3), BATCHES, lost, workspace=tmp_path / "w", quiet=True)
    assert said in caplog.text
    assert_is_whole(q, tmp_path / "saved")


def test_ctrl_c_while_the_display_of_the_search_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At a terminal, a thread that draws it has to end."""

    @contextlib.contextmanager
    def stage(_stages: Stages, description: str) -> Iterator[None]:
        yield
        if description == "searching":
            raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "stage", stage)
    q = pared.fit(MODEL, conf(1e-3, max_trials=3), BATCHES, lost)
    assert "without its remaining measurements" in caplog.text
    assert_is_whole(q, tmp_path)


@pytest.mark.parametrize("place", [1, 3])
def test_ctrl_c_while_the_curve_is_traced(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The points so far are kept, beside those of the trials."""
    trace = trade_off.trace

    def traced(compressor: Any) -> Curve:
        monkeypatch.setattr(compressor, "at_damage", interrupting(compressor.at_damage, place))
        return trace(compressor)

    monkeypatch.setattr(trade_off, "trace", traced)
    q = pared.fit(MODEL, conf(1e-3), BATCHES, lost, quiet=True)
    assert len(q.curve().points) == place - 1 + len(q.trials)
    assert_is_whole(q, tmp_path)


@pytest.mark.parametrize("confirming", [False, True])
def test_ctrl_c_during_the_users_functions(confirming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    functions = (lost, interrupting(lost, 2)) if confirming else (interrupting(lost, 3), None)
    q = pared.fit(MODEL, conf(1e-4), BATCHES, *functions, quiet=True)
    assert f"interrupted: the best of {len(q.trials)} trials is returned" in caplog.text
    assert_is_whole(q, tmp_path)


@pytest.mark.parametrize("owner_and_name", [(Compressor, "read"), (Compressor, "within_bytes")])
def test_ctrl_c_in_a_search_that_goes_on(
    owner_and_name: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials of an earlier run count: the best of them is returned, though this run has made none."""
    given = conf(1e-3, max_size=20_000)
    first = pared.fit(MODEL, given, BATCHES, lost, workspace=tmp_path / "w", quiet=True)
    owner, name = owner_and_name
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), 1))
    again = pared.fit(MODEL, given, BATCHES, lost, workspace=tmp_path / "w", quiet=True)
    assert again.trials == first.trials
    assert pared.save(again, tmp_path / "a").read_bytes() == pared.save(first, tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["within_bytes", "build"])
def test_ctrl_c_without_a_trial_is_the_callers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compressor, name, interrupting(getattr(Compressor, name), 1))
    for function in (lost, None):
        with pytest.raises(KeyboardInterrupt):
            pared.fit(MODEL, conf(1e-3, max_size=20_000), BATCHES, function, quiet=True)
        monkeypatch.setattr(Compressor, name, interrupting(getattr(Compressor, name), 1))
