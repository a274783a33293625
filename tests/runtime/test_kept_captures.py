"""Captured graphs that outlive a process are those that would be captured now, or they are not taken."""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.runtime.graphs.call_kinds import Argument, arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing import kept
from pared.runtime.graphs.capturing.capture import Captured, capture, module_of
from pared.runtime.graphs.capturing.identity import UnknownError, key_of
from pared.runtime.graphs.graph import Graph
from tests.runtime.exports import CASES

CALL = (Argument("x", "float32", (3, 8)),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose calls were captured."""
    found: list[nn.Module] = []

    def counted(model: nn.Module, *rest: Any) -> Captured:
        found.append(model)
        return capture(model, *rest)

    monkeypatch.setattr(kept, "capture", counted)
    return found


def described(captured: Captured) -> list[str]:
    """All that a graph is, as text."""
    nodes = [
        f"{node.op} {node.name} {node.target} {node.args} {dict(node.kwargs)} {module_of(node)} {node.meta.get('val')}"
        for node in captured.graph.nodes
    ]
    rest = (captured.tensors, captured.inputs, captured.note, {n: t.tolist() for n, t in captured.constants.items()})
    return [*nodes, *map(str, rest)]


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"lstm", "gru"}))
def test_what_is_read_is_what_was_captured(name: str, folder: Path, made: list[nn.Module]) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().eval()
    x = torch.randint(0, 4, shape) if name == "tied" else torch.randn(shape)
    bound = bind(parameters_of(model), (x,), {})
    assert bound is not None
    one = kept.captured(make().eval(), arguments_of(bound))
    assert len(made) == len(list(folder.iterdir())) == 1
    other = kept.captured(make().eval(), arguments_of(bound))
    assert len(made) == 1
    assert described(other) == described(one)
    with torch.no_grad():
        first, second = Graph(model, one)(bound), Graph(model, other)(bound)
    for a, b in zip(torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(second), strict=True):
        assert torch.equal(a, b)


class Net(nn.Module):
    """A model with attributes that decide what it computes."""

    def __init__(self, scale: Any = 2.0, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(8, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale["value"] if isinstance(self.scale, dict) else self.scale
        out: Tensor = self.layer(x) * (scale(1.0) if callable(scale) else scale)
        return out

    def negative(self, x: Tensor) -> Tensor:
        return -self.layer(x)


class Config:
    """Holds an option, as the configurations of many libraries do."""

    def __init__(self, value: float) -> None:
        self.value = value

    def plus(self, x: float) -> float:
        return x + self.value

    def minus(self, x: float) -> float:
        return x - self.value


class Scale:
    """A function with a number of its own."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, x: float) -> float:
        return self.value * x


FACTOR = 2.0


def times(x: float, factor: float = 1.0) -> float:
    return FACTOR * factor * x


def with_forward(name: str) -> nn.Module:
    model: Any = Net()
    model.forward = MethodType(getattr(Net, name), model)
    return model


def with_method(name: str) -> nn.Module:
    return Net(getattr(Config(2.0), name))


def made_inside(factor: float) -> nn.Module:
    class Inside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * factor

    return Inside()


def twice(x: float) -> float:
    return 2 * x


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


DIFFERENT: list[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = [
    (Net, lambda: Net(3.0)),
    (Net, lambda: Net(width=9)),
    (lambda: Net({"value": 2.0}), lambda: Net({"value": 3.0})),
    (lambda: Net(Config(2.0)), lambda: Net(Config(3.0))),
    (lambda: Net(twice), lambda: Net(float)),
    (lambda: Net(lambda x: 2 * x), lambda: Net(lambda x: 3 * x)),
    (lambda: Net(torch.tensor(2.0)), lambda: Net(torch.tensor(3.0))),
    (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.GELU())),
    (tied, lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))),
    (Net, lambda: Net().double()),
    (lambda: Net(functools.partial(times, factor=2.0)), lambda: Net(functools.partial(times, factor=3.0))),
    (lambda: Net(Scale(2.0)), lambda: Net(Scale(3.0))),
    (lambda: with_method("plus"), lambda: with_method("minus")),
    (lambda: with_forward("forward"), lambda: with_forward("negative")),
    (lambda: Net(lambda x, factor=2: factor * x), lambda: Net(lambda x, factor=3: factor * x)),
    (lambda: made_inside(2.0), lambda: made_inside(3.0)),
    (lambda: Net({"value": (1, (2, 3))}), lambda: Net({"value": (1, (2,), 3)})),
    (lambda: Net({"value": {"a": 1}, "b": 2}), lambda: Net({"value": {"a": 1, "b": 2}})),
    (lambda: Net({"value": {1: 2}}), lambda: Net({"value": {"1": 2}})),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_whatever_decides_is_in_the_key(one: Callable[[], nn.Module], other: Callable[[], nn.Module]) -> None:
    assert key_of(one(), CALL) == key_of(one(), CALL)
    assert key_of(one(), CALL) != key_of(other(), CALL)


def test_what_is_set_outside_of_the_model_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return key_of(Net(times).float(), CALL)

    found = [key()]
    with monkeypatch.context() as changed:
        changed.setattr(sys.modules[__name__], "FACTOR", 3.0)
        found.append(key())
    with monkeypatch.context() as changed:
        changed.setattr(Net, "option", 3.0, raising=False)
        found.append(key())
    with monkeypatch.context() as changed:
        changed.setattr(Net, "forward", Net.negative)
        found.append(key())
    torch.set_default_dtype(torch.float64)
    try:
        found.append(key())
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(set(found)) == len(found)
    assert key() == found[0]


def test_every_name_that_code_takes_from_a_module_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModuleType("options")
    options.__file__ = str(tmp_path / "options.py")
    options.one, options.two = 1, 1  # type: ignore[attr-defined]  # it holds what is set
    monkeypatch.setitem(sys.modules, "options", options)
    monkeypatch.setitem(sys.modules, "user_code", ModuleType("user_code"))  # restored at the end
    lines = ("import options", "from torch import nn", "class Own(nn.Module):")
    methods = (
        "  def forward(self, x): return self.second(x) * options.one",
        "  def second(self, x): return options.two",
    )
    (tmp_path / "user_code.py").write_text("\n".join((*lines, *methods)))
    own = loaded(tmp_path / "user_code.py").Own
    found = [key_of(own(), CALL)]
    for name in ("one", "two"):
        setattr(options, name, 2)
        found.append(key_of(own(), CALL))
    assert len(set(found)) == 3


class Slots:
    """Has no dict that says all."""

    __slots__ = ("value",)


class Beside(Slots):
    """Has a dict, too."""


@pytest.mark.parametrize("held", [torch.zeros(2000), np.zeros(3), Beside(), [nn.Linear(2, 2)], iter(())], ids=range(5))
def test_what_no_key_can_tell_is_not_kept(held: object, folder: Path) -> None:
    model = Net()
    model.other = held  # type: ignore[assignment]  # it may be anything
    with pytest.raises(UnknownError):
        key_of(model, CALL)
    kept.captured(model, CALL)
    assert not folder.exists()


def test_a_model_whose_attributes_raise_is_captured(folder: Path) -> None:
    class Refuses(dict[str, int]):
        def __len__(self) -> int:
            raise ValueError("not now")

    model = Net()
    model.other = Refuses()  # type: ignore[assignment]  # it may be anything
    assert kept.captured(model, CALL).graph.nodes
    assert not folder.exists()


@pytest.mark.child
def test_the_key_is_the_same_in_every_process() -> None:
    code = "from tests.runtime import test_kept_captures as t; print(t.key_of(t.Net({'value': {'a', 'b'}}), t.CALL))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1


def test_weights_are_not_in_the_key_and_calls_are() -> None:
    model = Net()
    before = key_of(model, CALL)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    model.layer.weight.requires_grad_(False)
    assert key_of(model, CALL) == before
    for call in (Argument("x", "float32", (4, 8)), Argument("x", "float64", (3, 8)), Argument("y", "float32", (3, 8))):
        assert key_of(model, [call]) != before
    assert key_of(model, [*CALL, Argument("flag", value=True)]) != key_of(model, [*CALL, Argument("flag", value=False)])


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("user_code", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_code"] = module
    spec.loader.exec_module(module)
    return module


def test_code_that_is_edited_is_captured_again(
    folder: Path, made: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "user_code", ModuleType("user_code"))  # restored at the end
    code = "from torch import nn\nclass Own(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)"
    user = tmp_path / "user"
    user.mkdir()
    (user / "user_code.py").write_text(code)
    for _ in range(2):
        kept.captured(loaded(user / "user_code.py").Own(8, 8), [Argument("x", "float32", (3, 8))])
    assert len(made) == 1
    (user / "user_code.py").write_text(f"{code} * 2")
    kept.captured(loaded(user / "user_code.py").Own(8, 8), [Argument("x", "float32", (3, 8))])
    assert len(made) == 2
    (user / "beside.py").write_text("")  # it may be imported
    kept.captured(loaded(user / "user_code.py").Own(8, 8), [Argument("x", "float32", (3, 8))])
    assert len(made) == 3
    sys.modules["user_code"].__version__ = "1.0"  # type: ignore[attr-defined]  # which an edit does not change
    (user / "user_code.py").write_text(f"{code} * 3")
    kept.captured(sys.modules["user_code"].Own(8, 8), [Argument("x", "float32", (3, 8))])
    assert len(made) == 4
    del sys.modules["user_code"].__file__
    with pytest.raises(UnknownError, match="the code of user_code is in no file"):
        key_of(sys.modules["user_code"].Own(8, 8), CALL)
    kept.captured(sys.modules["user_code"].Own(8, 8), [Argument("x", "float32", (3, 8))])
    assert len(made) == 5
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("trouble", ["damaged", "empty", "shortened", "writable", "foreign", "a folder"])
def test_what_cannot_be_read_is_captured_again(
    trouble: str, folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kept.captured(Net(), CALL)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    if trouble == "writable":
        file.chmod(0o666)
    elif trouble == "foreign":
        monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1, raising=False)
    elif trouble == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"damaged": b"\x80" + content[::-1], "empty": b"", "shortened": content[:-100]}[trouble])
    other = kept.captured(Net(), CALL)
    assert len(made) == 2
    assert described(other) == described(one)


@pytest.mark.skipif(os.name == "nt", reason="there is no mask of permissions")
def test_graphs_are_read_where_a_group_may_write_to_new_files(folder: Path, made: list[nn.Module]) -> None:
    before = os.umask(0o002)
    try:
        for _ in range(2):
            kept.captured(Net(), CALL)
    finally:
        os.umask(before)
    assert len(made) == 1


def test_nothing_is_kept_where_nothing_can_be(
    made: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file" / "below")):
        monkeypatch.setenv("PARED_CACHE", place)
        kept.captured(Net(), CALL)
    assert len(made) == 2
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_the_oldest_graphs_go(folder: Path, monkeypatch: pytest.MonkeyPatch, made: list[nn.Module]) -> None:
    monkeypatch.setattr(kept, "_MOST", 2)
    for age, scale in enumerate((1.0, 2.0)):
        kept.captured(Net(scale), CALL)
        for file in folder.iterdir():
            os.utime(file, (age, age))
    kept.captured(Net(1.0), CALL)  # was used last
    kept.captured(Net(3.0), CALL)
    assert len(list(folder.iterdir())) == 2
    kept.captured(Net(1.0), CALL)
    assert len(made) == 3
