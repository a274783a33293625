"""The runtimes beside PyTorch: called like the model, and clear where they cannot run."""

from __future__ import annotations

import importlib
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import pared
from pared import ConfigError, CorruptError, FileError
from pared.runtime.onnx.engines import OpenVinoSession, Runner
from pared.runtime.onnx.signature import Outputs, Signature, describe, signature_of

pytestmark = pytest.mark.engine

ENGINES = ("onnxruntime", "openvino")


class Scaled(nn.Module):
    """Two tensors and a number in, a dict of a tensor, a tuple and nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 8)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        out = self.inner(x) * scale
        return {"out": out, "sums": (out + pair[0], [out - pair[1]]), "none": None, "count": 3}


def arguments(rows: int = 4) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(rows)
    x, a, b = (torch.randn(rows, width, generator=chance) for width in (64, 8, 8))
    return x, (a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("saved")
    q = pared.fit(Scaled(), quiet=True)
    pared.save(q, directory)
    x, pair = arguments()
    pared.export(q, directory, {"scale": 2.0, "x": x, "pair": pair})
    return directory


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_called_like_the_model(engine: Any, saved: Path) -> None:
    runner, q = pared.load(saved, engine=engine), pared.load(saved, Scaled())
    assert isinstance(runner, Runner)
    assert (runner.engine, q.engine) == (engine, "torch")
    for rows in (4, 9):
        x, pair = arguments(rows)
        found, wanted = runner(x, pair=pair, scale=2.0), q(x, pair=pair, scale=2.0)
        assert type(found) is dict
        assert list(found) == list(wanted)
        assert (found["none"], found["count"]) == (None, 3)
        assert isinstance(found["sums"], tuple)
        assert isinstance(found["sums"][1], list)
        for a, b in ((found["out"], wanted["out"]), (found["sums"][1][0], wanted["sums"][1][0])):
            torch.testing.assert_close(a, b, rtol=0, atol=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_that_do_not_fit_are_refused(engine: Any, saved: Path) -> None:
    runner = pared.load(saved, engine=engine)
    x, pair = arguments()
    for args, kwargs, words in (
        ((x,), {}, "pair has 0 tensors, but had 2 at the export"),
        ((x, pair), {"scale": 3.0}, "scale is 3.0, but was 2.0 at the export"),
        ((x, pair), {"other": x}, "was exported without other"),
        ((x, pair, x), {}, "takes 2 positional arguments, not 3"),
        ((x.double(), pair), {}, "x is float64"),
        ((x[:, :63], pair), {}, "x is float32"),
        ((x, arguments(5)[1]), {}, "where another input has 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            runner(*args, **kwargs)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_may_call_it_at_once(engine: Any, saved: Path) -> None:
    runner = pared.load(saved, engine=engine)
    calls = [arguments(rows) for rows in range(2, 10)]
    wanted = [runner(*call)["out"] for call in calls]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = runner(*calls[i])["out"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(len(calls)))


def test_auto_measures_what_there_is(saved: Path) -> None:
    with_model = pared.load(saved, Scaled(), engine="auto")
    assert set(with_model.engine_ms) == {"torch", *ENGINES}
    assert with_model.engine == min(with_model.engine_ms, key=with_model.engine_ms.get)
    without = pared.load(saved, engine="auto")
    assert set(without.engine_ms) == set(ENGINES)


def test_auto_without_an_export_is_pytorch(tmp_path: Path) -> None:
    pared.save(pared.fit(nn.Linear(64, 8), quiet=True), tmp_path)
    assert pared.load(tmp_path, nn.Linear(64, 8), engine="auto").engine == "torch"
    with pytest.raises(FileError, match="is missing: the model has not been exported"):
        pared.load(tmp_path, engine="auto")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_package_is_named(engine: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == engine:
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr("pared.runtime.onnx.export.importlib.import_module", without)
    with pytest.raises(ConfigError, match=f"pip install 'pared\\[{engine}\\]'"):
        pared.load(saved, engine=engine)
    found = pared.load(saved, engine="auto")
    assert set(found.engine_ms) == set(ENGINES) - {engine}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_wrong_with_the_file_is_said(engine: Any, saved: Path, tmp_path: Path) -> None:
    pared.save(pared.fit(nn.Linear(64, 8), quiet=True), tmp_path)
    with pytest.raises(FileError, match=r"q_model\.export\(directory, inputs\)"):
        pared.load(tmp_path, engine=engine)
    file = tmp_path / "model.onnx"
    file.write_bytes((saved / "model.onnx").read_bytes())
    with pytest.raises(FileError, match="another artifact than the one that is beside it now"):
        pared.load(tmp_path, engine=engine)
    file.write_bytes(b"no graph")
    with pytest.raises(pared.ModelError, match=f"{engine} cannot load it"):
        pared.load(tmp_path, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_of_others_does_not_say_how_it_is_called(engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "others", [value], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(file))
    with pytest.raises(CorruptError, match="has no valid description of its inputs and outputs"):
        pared.load(tmp_path, engine=engine)


def test_unknown_engines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine='tvm' is not one of 'torch', 'onnxruntime', 'openvino', 'auto'"):
        pared.load(tmp_path, engine="tvm")  # type: ignore[call-overload]  # on purpose
    with pytest.raises(ConfigError, match="model is missing"):
        pared.load(tmp_path)


def test_a_signature_survives_its_text() -> None:
    x, pair = arguments()
    call = {"pair": pair, "scale": 2.0}
    signature = signature_of(Scaled(), (x,), call, Scaled()(x, **call))
    assert Signature.from_json(signature.to_json()) == signature
    assert [one.inputs for one in signature.arguments] == [("x",), ("pair_0", "pair_1"), ()]


def test_outputs_keep_their_structure() -> None:
    pair = namedtuple("pair", "a b")  # what is meant
    tensors = [torch.zeros(1), torch.ones(1)]
    for value, wanted in (
        (tensors[0], tensors[0]),
        ((tensors[0], None, {"k": tensors[1]}), (tensors[0], None, {"k": tensors[1]})),
        (pair(*tensors), tuple(tensors)),
    ):
        signature = Signature((), (), describe(value))
        assert signature.rebuild(tensors) == wanted
    assert Outputs(a=1, b=None, c=2)[:] == (1, 2)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.arange(6.0).reshape(2, 3), torch.tensor(2.0)),
        (torch.arange(6.0).reshape(3, 2).T, torch.tensor([2.0])),
        (torch.arange(6).reshape(2, 3), torch.tensor([2.0], dtype=torch.float64)),
        (torch.arange(12.0).reshape(2, 6)[:, ::2], torch.tensor([2.0])),
        (torch.zeros(0, 3), torch.tensor([2.0])),
    ],
)
def test_openvino_takes_inputs_of_any_layout_and_type(x: Tensor, y: Tensor) -> None:
    ov = pytest.importorskip("openvino")
    opset = ov.opset13
    sizes = [ov.PartialShape([-1] * one.dim()) for one in (x, y)]
    inputs = [opset.parameter(size, ov.Type.f32, name=name) for size, name in zip(sizes, ("x", "y"), strict=True)]
    model = ov.Model([opset.multiply(*inputs), inputs[0]], inputs)
    for one, name in zip(model.inputs, ("x", "y"), strict=True):
        one.set_names({name})
    session = OpenVinoSession(model, 1)
    first = session.run({"y": y, "x": x})
    session.run({"y": y + 1, "x": torch.ones(4, 3)})  # what was returned belongs to the caller
    assert torch.equal(first[0], (x * y).float())
    assert torch.equal(first[1], x.float())
