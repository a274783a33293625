"""`pared fit FOLDER` gives a folder that `from_pretrained` opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from pared import cli
from pared.runtime.record import record_of
from tests.runtime.hugging_face.folders import source
from tests.targets.gguf.folders import TEXTS

pytestmark = pytest.mark.slow


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["pared", *map(str, arguments)])
    with pytest.raises(SystemExit) as found:
        cli.main()
    code = found.value.code
    return code if isinstance(code, int) else 0


def test_a_folder_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 12, encoding="utf-8")
    assert (
        run(
            "fit",
            source(),
            "--calib",
            text,
            "--samples",
            1,
            "--quant-level",
            0,
            "-o",
            tmp_path / "out",
            "-q",
            monkeypatch=monkeypatch,
        )
        == 0
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record_of(model).activations
    assert model.config.use_cache
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_the_folder_itself_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = (source() / "config.json").read_bytes()
    assert run("fit", source(), "-o", source(), monkeypatch=monkeypatch) != 0
    assert "is the folder of the float model" in capsys.readouterr().err
    assert (source() / "config.json").read_bytes() == before


@pytest.mark.parametrize("target", ["pared", pytest.param("openvino", marks=pytest.mark.engine)])
def test_the_folder_of_another_model_is_refused(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(source(), tmp_path / "other")
    options = ["--target", target, "--calib", tmp_path / "missing.txt", "-o", tmp_path / "other"]
    assert run("fit", source(), *options, monkeypatch=monkeypatch) != 0
    assert "other: holds a model that pared did not write (model.safetensors)" in capsys.readouterr().err
