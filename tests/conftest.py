"""What holds for all tests: the markers of pyproject.toml say what a test needs, and `make quick` leaves those out."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from pared.files import threads
from pared.fitting import speed
from pared.runtime import stopwatch
from pared.runtime.graphs import fusion
from pared.runtime.kernels import linear, machine, patches

collect_ignore_glob = [] if importlib.util.find_spec("selenium") else ["*browser.py"]  # `make test` installs it

_TIME_CALLS = speed.time_calls

# Nothing here depends on a clock: machines do something else meanwhile.
hypothesis.settings.register_profile("pared", deadline=None)
hypothesis.settings.load_profile("pared")

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the processes that run tests share the cores
    torch.set_num_threads(max(1, threads.usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(autouse=True)
def _children_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts Python takes seconds and is marked `child`, so that `make quick` leaves it out."""
    if request.node.get_closest_marker("child") is not None:
        return
    start = subprocess.Popen.__init__

    def refuse(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if sys.executable in args:
            pytest.fail("it starts a process: mark it with @pytest.mark.child")
        start(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(autouse=True, scope="session")
def _as_on_most_machines() -> Iterator[None]:
    """Layers decide, and there are no tiles; fixtures of every scope are made under these rules, too.

    Whole models are timed only in tests that are marked so: it takes seconds of each `fit`, and chance decides.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "time_calls", lambda *_, **__: ())
        patch.setenv("PARED_CACHE", "")  # nothing outlives a test
        patch.setattr(stopwatch, "waited_seconds", lambda: 0.0)
        _set_tiles(patch, there=False)
        yield


@pytest.fixture(autouse=True)
def _whole_models_are_timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("whole_models_are_timed") is not None:
        monkeypatch.setattr(speed, "time_calls", _TIME_CALLS)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and kernels are as on a machine with tiles."""
    _set_tiles(monkeypatch, there=True)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are as on a machine with VNNI, where all codes may have 8 bits; sums may saturate where there is none."""
    monkeypatch.setattr(machine, "exact_products", lambda: True)


def _set_tiles(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    monkeypatch.setattr(fusion, "has_tiles", lambda: there)
    monkeypatch.setattr(patches, "has_tiles", lambda: there)
    monkeypatch.setattr(linear, "has_tiles", lambda: there)
