"""`pared evaluate`, and a text as the score of `pared fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pared
from pared.cli import app
from tests.evaluation.models import TEXT, folder_of

pytestmark = pytest.mark.slow


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_a_folder_is_fitted_within_a_loss_on_a_text_and_evaluated(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT * 8, encoding="utf-8")
    other.write_text(TEXT[300:] * 10, encoding="utf-8")
    out = tmp_path / "out"
    goal = ("--eval", other, "--tolerable-loss", 0.01, "--absolute", "--approach", "weight_only")
    done = run("fit", folder, "--calib", text, "--samples", 4, *goal, "-o", out)
    assert done.exit_code == 0, done.output
    found = run("evaluate", out, "--text", other, "--reference", folder, "--json")
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    expected = pared.evaluate(out, other, folder)
    assert figures["perplexity"] == expected.perplexity
    assert figures["kl"] == expected.kl
    assert expected.loss - expected.reference_loss <= 0.012
    assert figures["windows"] == len(expected.windows) > 4
    shown = run("evaluate", out, "--text", other, "--reference", folder, "--context", 64, "--stride", 32)
    assert str(pared.evaluate(out, other, folder, context=64, stride=32)) in shown.stdout


def test_errors_are_those_of_the_family(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "short.txt").write_text("", encoding="utf-8")
    done = run("evaluate", folder, "--text", tmp_path / "short.txt")
    assert done.exit_code != 0
    assert "short.txt: has 0 tokens" in str(done.exception)
    assert "model is neither a model nor a folder" in str(run("evaluate", "x", "--text", "y").exception)
