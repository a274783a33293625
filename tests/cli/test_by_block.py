"""`pared fit FOLDER --by-block`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.fitting.hugging_face import memory
from pared.fitting.hugging_face.loading import model_in
from tests.fitting.streamed.models import small, some_calls, written
from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with

BATCHES = [dict(call.kwargs) for call in some_calls(3)]


@pytest.mark.slow
def test_a_folder_is_fitted(tmp_path: Path) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model", dtype=torch.bfloat16)
    options = ["--calib", "tests.cli.test_by_block:BATCHES", "--bits", "6", "--workspace", str(tmp_path / "work")]
    done = CliRunner().invoke(app, ["fit", str(folder), *options, "--by-block", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / "best_model.safetensors"
    assert f"written: {path} ({path.stat().st_size:,} bytes)" in done.output.replace("\n", "")
    numbers = sum(one.numel() for one in model_in(folder).parameters())
    assert path.stat().st_size <= numbers * 6 / 8
    assert pared.load(tmp_path / "out", model_in(folder), quiet=True)(**BATCHES[0]).logits.isfinite().all()


def score(model: Any) -> float:
    """How small the squares of the logits are, which hardly depends on the weights' last bits."""
    with torch.no_grad():
        return -float(model(**BATCHES[0]).logits.square().mean())


@pytest.mark.slow
def test_a_model_beyond_the_memory_is_searched_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    folder = written(small("Llama", layers=2), tmp_path / "model", dtype=torch.bfloat16)
    calib = ["--calib", "tests.cli.test_by_block:BATCHES", "--workspace", str(tmp_path / "work")]
    options = ["--eval", "tests.cli.test_by_block:score", "--tolerable-loss", "0.05", "--max-trials", "2"]
    done = CliRunner().invoke(app, ["fit", str(folder), *calib, *options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "criterion met" in done.output
    assert (tmp_path / "out" / "report.html").is_file()
    found: Any = pared.load(tmp_path / "out", model_in(folder), quiet=True)
    assert found.pared.met
    assert found.pared.baseline == pytest.approx(score(model_in(folder)), rel=1e-5)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert score(opened) == pytest.approx(found.pared.score, rel=1e-3)


@pytest.mark.slow
def test_a_curve_is_traced_with_the_sweeps_of_the_fit(tmp_path: Path) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model", dtype=torch.bfloat16)
    given = [str(folder), "--calib", "tests.cli.test_by_block:BATCHES", "--by-block", "--workspace"]
    options = [*given, str(tmp_path / "work"), "-o"]
    done = CliRunner().invoke(app, ["fit", *options, str(tmp_path / "curve"), "--curve"])
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / "curve" / "curve.json").read_text())["points"]
    assert len(points) > 2
    assert not list(tmp_path.glob("work/coded/??????-[0-9]*.bin"))  # nothing was rounded but what rules decide
    before = [one.stat().st_mtime_ns for one in sorted(tmp_path.glob("work/traced-*"))]
    size = str(points[1]["nbytes"])
    done = CliRunner().invoke(app, ["fit", *options, str(tmp_path / "out"), "--max-size", size])
    assert done.exit_code == 0, done.output
    assert [one.stat().st_mtime_ns for one in sorted(tmp_path.glob("work/traced-*"))] == before
    assert (tmp_path / "out" / "best_model.safetensors").stat().st_size <= points[1]["nbytes"]


def test_a_dry_run_looks_at_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model")
    whole = pared.estimate(model_in(folder))
    given = ["fit", str(folder), "--calib", "tests.cli.test_by_block:BATCHES", "--dry-run"]
    monkeypatch.setattr("pared.fitting.hugging_face.loading.model_in", lambda *_: pytest.fail("the whole model"))
    for options in ([], ["--by-block"]):  # the second one where the model would fit
        with monkeypatch.context() as small_machine:
            if not options:
                small_machine.setattr(memory, "available", lambda: 1000)
            done = CliRunner().invoke(app, [*given, *options])
        assert done.exit_code == 0, done.output
        assert f"about {whole.nbytes:,} bytes" in done.output
        assert "nothing was written" in done.output
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.child
def test_what_is_written_opens_with_from_pretrained(tmp_path: Path) -> None:
    """In a fresh process, by block as from memory."""
    model: Any = built("Llama", max_position_embeddings=32, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    folder_with(tmp_path / "model", "smollm", model.config.to_dict())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 8, encoding="utf-8")
    plain = ["fit", str(tmp_path / "model"), "--calib", str(text), "--bits", "4", "--samples", "6", "-q"]
    ways = {"by-block": ["--by-block"], "whole": ["--approach", "weight_only"]}
    for name, options in ways.items():
        done = CliRunner().invoke(app, [*plain, *options, "-o", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", *ways}  # the workspace is gone
    beside = [{path.name for path in (tmp_path / name).iterdir()} - {"engine.json"} for name in ways]
    assert beside[0] == beside[1] > {"best_model.safetensors", "config.json", "deploy.yaml", "tokenizer.json"}

    command = [sys.executable, "-m", "tests.cli.opened_child", str(text), *(str(tmp_path / name) for name in ways)]
    done_there = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done_there.returncode == 0, done_there.stderr
    start = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(text.read_text())["input_ids"][:8]
    exact = pared.evaluate(tmp_path / "model", text, quiet=True).loss
    for name, told in zip(ways, json.loads(done_there.stdout), strict=True):
        loaded: Any = pared.load(tmp_path / name, model_in(tmp_path / "model"), quiet=True)
        with torch.no_grad():
            tokens = loaded.generate(torch.tensor([start]), max_new_tokens=8, do_sample=False)[0].tolist()
        assert told["tokens"] == tokens
        assert "LlamaForCausalLM" in told["class"]
        assert told["loss"] == pytest.approx(exact, rel=0.05)
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert shown.exit_code == 0, shown.output
        assert "model.layers.1.mlp.down_proj.weight" in shown.output


@pytest.mark.slow
def test_a_text_decides_for_a_runtime(tmp_path: Path) -> None:
    model: Any = built("Llama", max_position_embeddings=32, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    folder_with(tmp_path / "model", "smollm", model.config.to_dict())
    for name, words in (("calib.txt", TEXTS), ("held.txt", TEXTS[::-1])):
        (tmp_path / name).write_text(" ".join(words) * 8, encoding="utf-8")
    given = ["--calib", str(tmp_path / "calib.txt"), "--eval", str(tmp_path / "held.txt"), "--samples", "4"]
    wanted = ["--tolerable-loss", "0.05", "--absolute", "--target", "gguf", "--max-trials", "3"]
    places = ["--by-block", "--workspace", str(tmp_path / "work"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["fit", str(tmp_path / "model"), *given, *wanted, *places])
    assert done.exit_code == 0, done.output
    assert "criterion met" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "report.html"}
    assert f"written: {tmp_path / 'out' / 'model.gguf'}" in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--workers", "ray://localhost:1"], "--workers excludes --dry-run"),
        (["--curve"], "for which a workspace is needed"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "model").mkdir()
    more = ["--calib", "tests.cli.test_by_block:BATCHES", "--by-block", "-o", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, ["fit", str(tmp_path / "model"), *more])
    assert done.exit_code != 0
    assert message in str(done.exception) or message in done.output
