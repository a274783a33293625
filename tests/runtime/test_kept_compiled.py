"""What OpenVINO compiled in an earlier process answers calls as if it were compiled now, or it is not taken."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pared.model.contents import Contents
from pared.model.recorded.state import Attributes
from pared.runtime import float_forms
from pared.runtime.graphs.call_kinds import arguments_of
from pared.runtime.graphs.capturing import kept
from pared.runtime.graphs.capturing.capture import Captured, capture
from pared.runtime.openvino import compiled
from pared.runtime.openvino import graph as openvino_graph
from pared.runtime.openvino.conversion import converted
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import serve
from pared.runtime.serving.server import Capture
from tests.runtime.exports import fitted
from tests.runtime.test_graphs import bound_of

pytestmark = pytest.mark.engine


class Named(nn.Module):
    """An output with a constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"out": self.second(self.first(x).relu()), "kind": "named"}


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were converted."""
    found: list[nn.Module] = []

    def counted(model: nn.Module, captured: Captured, contents: Contents) -> object:
        found.append(model)
        return converted(model, captured, contents)

    monkeypatch.setattr(openvino_graph, "converted", counted)
    return found


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def quantized(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return fitted(Named().eval(), "static", [X])


def answers(q: nn.Module, captured: Capture = kept.captured) -> list[Tensor]:
    """What a model answers by graphs that are made now, at its first call and at the second."""
    server = OpenVinoServer(float_forms.outline_of, [arguments_of(bound_of(q, {"x": X}))], captured)
    serve(q, server)
    with torch.no_grad():
        found = [q(X) for _ in range(2)]
    assert server.reason(bound_of(q, {"x": X})) == ""
    assert [one["kind"] for one in found] == ["named"] * 2
    return [one["out"] for one in found]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.openvino"))


def test_it_is_made_once_and_gives_the_same(folder: Path, made: list[nn.Module]) -> None:
    q = quantized()
    first, second = answers(q), answers(q)
    assert len(made) == len(files(folder)) == 1
    assert all(torch.equal(one, first[0]) for one in (*first, *second))


def test_another_number_of_threads_is_compiled_from_the_model_as_it_is(folder: Path, made: list[nn.Module]) -> None:
    q = quantized()
    (expected, _), _ = answers(q), answers(q)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with torch.no_grad():
            torch.testing.assert_close(q(X)["out"], expected)
    finally:
        torch.set_num_threads(before)
    assert len(made) == 2
    assert len(files(folder)) == 1


def test_a_later_process_does_not_run_the_modules_to_compare(
    folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = quantized()
    expected = answers(q)
    assert len(made) == 1

    def fail(*_: object) -> None:
        raise AssertionError("the modules run")

    monkeypatch.setattr(Attributes, "changed_by", fail)  # around the modules, where a graph is compared
    assert torch.equal(answers(q)[0], expected[0])
    (checked,) = folder.glob("*.checked")
    checked.write_bytes(b"{")
    with pytest.raises(AssertionError, match="the modules run"):
        answers(q)
    checked.write_bytes(b"[[true, true]]")  # of other calls
    with pytest.raises(AssertionError, match="the modules run"):
        answers(q)


@pytest.mark.parametrize("change", ["other numbers", "OpenVINO"])
def test_whatever_decides_is_in_the_key(
    change: str, folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = quantized()
    answers(q)
    if change == "other numbers":
        q = quantized(seed=1)
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "2099.1")
    name = compiled._file_of(q, float_forms.outline_of(q), arguments_of(bound_of(q, {"x": X})), torch.get_num_threads())
    assert name is not None
    assert name not in files(folder)
    assert len(made) == 1


@pytest.mark.parametrize("trouble", ["damaged", "empty", "shortened", "writable", "foreign"])
def test_what_cannot_be_read_is_made_again(
    trouble: str, folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = quantized()
    expected = answers(q)
    (file,) = files(folder)
    content = file.read_bytes()
    if trouble == "writable":
        file.chmod(0o666)
    elif trouble == "foreign":
        monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1, raising=False)
    else:
        middle = len(content) // 2
        damaged = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"damaged": damaged, "empty": b"", "shortened": content[:-100]}[trouble])
    assert torch.equal(answers(q)[0], expected[0])
    assert len(made) == 2


def test_the_oldest_go(folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MOST", 1)
    for seed in range(2):
        answers(quantized(seed))
    assert len(files(folder)) == 1
    assert len(made) == 2


@pytest.mark.parametrize("place", ["", "a file"])
def test_nothing_is_kept_where_nothing_can_be(
    place: str, tmp_path: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARED_CACHE", place and str(tmp_path / "file" / "below"))
    q = quantized()
    answers(q)
    answers(q)
    assert len(made) == 2


def test_what_fit_tries_is_not_kept(folder: Path, made: list[nn.Module]) -> None:
    answers(quantized(), capture)
    assert files(folder) == []
    assert len(made) == 1
