"""What holds for all tests."""

import pytest

from pared.fitting import speed
from pared.runtime.graphs import fusion
from pared.runtime.kernels import linear, patches


@pytest.fixture(autouse=True)
def _layers_decide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are timed only in tests that are marked so: it takes seconds of each `fit`, and chance decides."""
    if request.node.get_closest_marker("whole_models_are_timed") is None:
        monkeypatch.setattr(speed, "time_calls", lambda *_: ())


@pytest.fixture(autouse=True)
def _no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and kernels are as on most machines, whatever this one has."""
    _set_tiles(monkeypatch, there=False)


@pytest.fixture
def tiles(_no_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and kernels are as on a machine with tiles."""
    _set_tiles(monkeypatch, there=True)


def _set_tiles(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    monkeypatch.setattr(fusion, "has_tiles", lambda: there)
    monkeypatch.setattr(patches, "has_tiles", lambda: there)
    monkeypatch.setattr(linear, "has_tiles", lambda: there)
