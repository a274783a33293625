"""What holds for all tests."""

import pytest

from pared import speed


@pytest.fixture(autouse=True)
def _layers_decide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are timed only in tests that are marked so: it takes seconds of each `fit`, and chance decides."""
    if request.node.get_closest_marker("whole_models_are_timed") is None:
        monkeypatch.setattr(speed, "time_calls", lambda *_: ())
