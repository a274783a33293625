"""Pickles of quantized models name nothing inside of the package, and those of before are refused with a way out."""

import io
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, CorruptError, PostTrainingQuantConfig, VersionError
from pared.runtime.record import record_of

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.slow  # almost every test here fits a whole model


def named_in(data: bytes) -> set[str]:
    """The names that a pickle, of itself or in a file of torch.save, has imported."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            data = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    found, strings = set(), [""]
    for op, argument, _ in pickletools.genops(data):
        if op.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif op.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
        elif op.name in ("BINGET", "LONG_BINGET"):
            strings.append("memo")  # of a name that was named before
    return found


def searched() -> Any:
    """A small model after a search, with measured times and an unmet criterion: all that a pickle may hold of it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(32, 48)
    criterion = AccuracyCriterion(tolerable_loss=0.0)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion, approach="static", max_trials=1)
    scores = iter([1.0, 0.5])  # of the float model, and of the one that is tried
    return pared.fit(model, conf, [x], lambda _: [next(scores)] * 8)


@pytest.mark.whole_models_are_timed
def test_a_pickle_names_nothing_inside_of_the_package() -> None:
    q = searched()
    assert q.pared.trials
    assert record_of(q).outcome.contributors
    assert record_of(q).profile.model.calls
    buffer = io.BytesIO()
    torch.save(q, buffer)
    for data in (buffer.getvalue(), *(pickle.dumps(q, protocol) for protocol in (2, 3, 4, 5))):
        ours = {name for name in named_in(data) if name.startswith("pared")}
        assert ours == {"pared._revive"}
    loaded = pickle.loads(pickle.dumps(q))
    assert record_of(loaded).outcome == record_of(q).outcome
    assert record_of(loaded).profile == record_of(q).profile


def test_a_pickle_of_before_names_the_way() -> None:
    """Written at commit 5192997, when pickles named seven modules inside of the package."""
    data = (GOLDEN / "pickle_5192997.pt").read_bytes()
    ours = {name for name in named_in(data) if name.startswith("pared")}
    assert {"pared.model._revive", "pared.profile.Profile", "pared.ways.Argument", "pared.outcome.Trial"} <= ours
    with pytest.raises(VersionError, match=r"earlier version than 0\.1(.|\n)*pared\.load\(directory, model="):
        torch.load(io.BytesIO(data), weights_only=False)


def test_a_pickle_of_before_is_refused_before_its_other_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that it names may be gone."""
    for name in ("pared.profile", "pared.ways", "pared.outcome"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VersionError, match=r"earlier version than 0\.1"):
        torch.load(GOLDEN / "pickle_5192997.pt", weights_only=False)


def test_a_damaged_pickle_is_an_error_of_the_family() -> None:
    with pytest.raises(CorruptError, match="the record in the pickle of a quantized model cannot be read"):
        pared._revive(nn.Linear(1, 1), b"", "{}")
