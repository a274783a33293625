"""Commands that write for other runtimes, from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.cli.models import Source, first_batch
from pared.errors import ConfigError
from pared.fitting.hugging_face import loading
from pared.targets.table import TARGETS
from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with
from tests.targets.quantized import in_format, in_rows, quantized_as

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = built("Llama", max_position_embeddings=32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "source")
    folder_with(tmp_path / "source", "smollm", model.config.to_dict())
    return tmp_path / "source"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXTS) * 20, encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def types_of(path: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def test_a_folder_is_fitted_for_a_runtime(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("fit", folder, "--calib", text, "--target", "gguf", "--bits", 6, "--samples", 4, "-o", out)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"model.gguf", "report.html"}
    assert f"written: {out / 'model.gguf'}" in done.output.replace("\n", "")
    assert set(types_of(out / "model.gguf").values()) - {"F32"} <= {offer.name for offer in TARGETS["gguf"].offers}
    numbers = sum(parameter.numel() for parameter in built("Llama", num_hidden_layers=1).parameters())
    held = sum(one.n_bytes for one in gguf.GGUFReader(out / "model.gguf").tensors)
    assert held <= numbers * 6 / 8


def test_an_artifact_has_what_was_beside_the_weights(folder: Path, text: Path, tmp_path: Path) -> None:
    done = run("fit", folder, "--calib", text, "--samples", 4, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    refused = run("export", tmp_path / "out", "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert refused.exit_code != 0  # its steps are powers of 2^(1/8)
    assert "cannot be held exactly" in str(refused.exception)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("kind", ["rows", "groups"])
def test_an_artifact_goes_into_a_file_without_its_code(kind: str, folder: Path, tmp_path: Path) -> None:
    choose = in_rows(8) if kind == "rows" else in_format(TARGETS["gguf"], "Q5_1")
    model = quantized_as(built("Llama", num_hidden_layers=1), choose)
    pared.save(model, tmp_path / "artifact")
    done = run("export", tmp_path / "artifact", "--to", "gguf", "-o", tmp_path / "x.gguf", "--folder", folder)
    assert done.exit_code == 0, done.output
    wanted = "Q8_0" if kind == "rows" else "Q5_1"
    assert f"8 in {wanted}, 3 in float32" in done.output
    held = {one.name: one for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    one = held["blk.0.ffn_down.weight"]
    expected = model.get_parameter("model.layers.0.mlp.down_proj.weight").numpy()
    assert np.array_equal(gguf.quants.dequantize(one.data, one.tensor_type), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calib", "nowhere.txt"], "--calib nowhere.txt: is neither PKG.MOD:OBJ nor a file"),
        (["--bits", 4, "--max-size", "1MB"], "--bits 4 with --max-size"),
        (["--bits", 0], "--bits 0 is not a valid rate"),
        (["--target", "ggml"], "target='ggml'"),
    ],
)
def test_options_that_make_no_sense(arguments: list[object], message: str, folder: Path, tmp_path: Path) -> None:
    done = run("fit", folder, *arguments, "-o", tmp_path / "new" / "out")
    assert done.exit_code != 0
    assert message in str(done.exception)
    assert not (tmp_path / "new").exists(), "what is refused leaves no directory"


@pytest.mark.parametrize("command", ["compress", "export", "fit"])
def test_every_command_knows_the_same_targets(command: str, folder: Path, tmp_path: Path) -> None:
    option = "--to" if command == "export" else "--target"
    done = run(command, folder, option, "ggml", "-o", tmp_path / "out", *(["--bits", 4] if command != "export" else []))
    known = ", ".join(map(repr, ("pared", *TARGETS)))
    assert f"='ggml' is not one of {known}" in str(done.exception)


def test_pared_is_a_target_as_well(folder: Path, tmp_path: Path) -> None:
    done = run("compress", folder, "--target", "pared", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/best_model.pt").is_file()
    refused = run("export", tmp_path / "out", "--to", "pared", "-o", tmp_path / "again")
    assert "is the target that an artifact is written for already" in str(refused.exception)
    with pytest.raises(ConfigError, match=r"for already\n  Call pared\.save\("):
        pared.export(quantized_as(built("Llama", num_hidden_layers=1), in_rows(8)), tmp_path / "x", to="pared")


def test_a_file_is_not_called_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("precious")
    done = run("compress", folder, "--target", "gguf", "--bits", 8, "-o", tmp_path / "model.gguf")
    assert "model.gguf: is there already\n  Choose another name, or delete this one." in str(done.exception)
    assert (tmp_path / "model.gguf").read_text() == "precious"


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("gguf", ("config.json", '"silu"', '"relu"'), "the activation is 'relu'"),
        ("gguf", ("tokenizer.json", '"Digits"', '"Strange"'), "splits text in a way that is not known"),
        ("compressed-tensors", ("config.json", '"llama"', '"gpt2"'), "store their matrices transposed"),
    ],
)
def test_what_a_runtime_does_not_run_is_refused_before_the_fit(
    target: str, change: tuple[str, str, str], message: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model = built("Llama", max_position_embeddings=32, num_hidden_layers=1)
    monkeypatch.setattr(loading, "model_in", lambda _: model)
    monkeypatch.setattr(pared, "fit", None)
    name, old, new = change
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    done = run("fit", folder, "--target", target, "--bits", 6, "-o", tmp_path / "out")
    assert message in str(done.exception)


def test_a_model_is_kept_where_its_export_fails(tmp_path: Path, monkeypatch: Any) -> None:
    """It has taken hours."""
    small = pared.fit(nn.Sequential(nn.Linear(8, 4)), quiet=True)

    def failing(*_args: object, **_options: object) -> None:
        raise ConfigError("cannot be written", remedy="Write it elsewhere.")

    monkeypatch.setattr(pared, "export", failing)
    source = Source("math:pi", None, None, None)
    monkeypatch.setattr(source, "_target", TARGETS["gguf"])
    with pytest.raises(ConfigError, match="cannot be written"):
        source.write(small, tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pt"] == ["best_model.pt"]


@pytest.mark.parametrize("most", [999, 1000])
def test_a_file_that_is_larger_than_was_asked_for_is_told(
    most: int, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = pared.fit(nn.Sequential(nn.Linear(8, 4)), quiet=True)
    monkeypatch.setattr(pared, "export", lambda *_, **__: SimpleNamespace(path=tmp_path / "x", nbytes=1000))
    source = Source("math:pi", None, "onnx", tmp_path)
    assert source.size(most, None) == most
    source.write(small, tmp_path, quiet=True)
    said = "warning: 1,000 bytes were written, 1 more than 999: the operators of the graph come on top of the weights. "
    assert (f"{said}--max-size 998 makes it fit." in capsys.readouterr().err) == (most < 1000)


def test_a_graph_needs_a_batch_before_the_fit(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pared, "fit", None)
    done = run("fit", folder, "--target", "onnx", "--bits", 6, "-o", tmp_path / "out")
    assert "onnx needs the graph of the model, which is captured from a batch" in str(done.exception)


@pytest.mark.parametrize("data", [None, lambda model: model(1), iter([torch.ones(1)])])
def test_data_without_a_batch_that_can_be_read_twice(data: Any) -> None:
    with pytest.raises(ConfigError, match="captured from a batch"):
        first_batch(data, "onnx")


def test_the_first_batch_is_taken_of_whatever_can_be_read_twice() -> None:
    loader: Any = torch.utils.data.DataLoader([torch.tensor([one]) for one in range(4)], batch_size=2)
    assert first_batch(loader, "onnx").tolist() == [[0], [1]]
    assert first_batch([3, 4], "onnx") == 3


def test_an_artifact_without_a_configuration(tmp_path: Path) -> None:
    pared.save(quantized_as(built("Llama", num_hidden_layers=1), in_rows(8)), tmp_path / "artifact")
    done = run("export", tmp_path / "artifact", "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert "has no config.json, which says what the model is" in str(done.exception)
    done = run("export", tmp_path / "artifact", "--to", "onnx", "-o", tmp_path / "x")
    assert "onnx needs the graph of the model" in str(done.exception)
