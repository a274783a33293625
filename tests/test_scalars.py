"""Numbers and truth values are taken from NumPy and torch as from Python; options that exclude each other do always."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pared
from pared import AccuracyCriterion, ConfigError, EvaluationError, PostTrainingQuantConfig, Rule
from pared.cli import app
from pared.fitting.search.evaluate import evaluate
from pared.scalars import plain
from pared.terminal import parse_size

WHOLE = [np.int64, np.int8, np.uint16, np.array, torch.tensor]
REAL = [np.float64, np.float32, np.float16, np.longdouble, np.array, torch.tensor]
TRUTH = [np.bool_, np.array, torch.tensor]


def same(found: Any, expected: Any) -> bool:
    return type(found) is type(expected) and bool(found == expected)


@pytest.mark.parametrize("made", WHOLE)
@pytest.mark.parametrize("option", ["quant_level", "max_size", "calibration_sampling_size", "max_trials", "seed"])
def test_whole_numbers_of_the_configuration(option: str, made: Callable[[int], Any]) -> None:
    given, expected = (PostTrainingQuantConfig(**{option: value}) for value in (made(1), 1))
    assert repr(given) == repr(expected)
    assert same(getattr(given, option), 1)


@pytest.mark.parametrize("made", REAL)
def test_real_numbers(made: Callable[[float], Any]) -> None:
    assert same(PostTrainingQuantConfig(timeout=made(2.5)).timeout, 2.5)
    assert same(AccuracyCriterion(tolerable_loss=made(0.5)).tolerable_loss, 0.5)
    assert same(Rule("a", bits=made(2.5)).bits, 2.5)
    assert same(evaluate(lambda _: made(0.5), nn.Identity()).value, 0.5)
    assert evaluate(lambda _: [made(0.5)] * 4, nn.Identity()).value == 0.5


@pytest.mark.parametrize("value", [torch.empty((), device="meta"), np.array([1, 0]), torch.ones(2)], ids=type)
@pytest.mark.parametrize("option", ["approach", "quant_level", "strict", "max_size", "seed", "timeout"])
def test_what_is_no_scalar_is_refused_in_words(option: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        PostTrainingQuantConfig(**{option: value})


@pytest.mark.parametrize("made", TRUTH)
def test_truth_values(made: Callable[[bool], Any]) -> None:
    assert same(AccuracyCriterion(higher_is_better=made(False)).higher_is_better, False)
    assert same(PostTrainingQuantConfig(strict=made(True)).strict, True)
    assert same(Rule("a", keep=made(True)).keep, True)
    for option in ("seed", "timeout", "max_trials", "quant_level"):
        with pytest.raises(ConfigError):
            PostTrainingQuantConfig(**{option: made(True)})
    with pytest.raises(ConfigError):
        parse_size(made(True))
    with pytest.raises(EvaluationError, match="not a score"):
        evaluate(lambda _: made(True), nn.Identity())


@pytest.mark.parametrize("given", [np.float64(2.5), np.array([2, 2]), torch.ones(1, 1), "3", None, 3j, Decimal(3)])
def test_what_is_no_whole_number_is_told(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"seed=.* is not an integer"):
        PostTrainingQuantConfig(seed=given)
    with pytest.raises(ConfigError, match=r"points=.* is not an integer"):
        pared.trade_off(nn.Linear(2, 2), points=given)
    with pytest.raises(ConfigError, match=r"calibration_sampling_size=.* is not an integer"):
        pared.tune_speed("nowhere", nn.Linear(2, 2), [], calibration_sampling_size=given)


def test_a_score_with_a_gradient_is_a_score() -> None:
    scores = [torch.tensor(float(i), requires_grad=True) for i in range(4)]
    assert evaluate(lambda _: scores, nn.Identity()).value == 1.0
    assert evaluate(lambda _: scores[3], nn.Identity()).value == 3.0


def test_other_numbers() -> None:
    assert same(plain(Fraction(1, 2)), 0.5)
    assert plain(Decimal(1)) == Decimal(1)  # no number of Python's tower
    assert plain(nn.Linear) is nn.Linear


@pytest.mark.parametrize("made", WHOLE)
def test_whole_numbers_elsewhere(made: Callable[[int], Any], tmp_path: Path) -> None:
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "m.pt")
    given = pared.compress(tmp_path / "m.pt", tmp_path / "a", bits=made(4)).read_bytes()
    assert given == pared.compress(tmp_path / "m.pt", tmp_path / "b", bits=4).read_bytes()
    assert same(parse_size(made(100)), 100)
    assert len(pared.trade_off(nn.Linear(8, 8), None, [torch.randn(4, 8)], points=made(1), quiet=True).points) == 1

    class Own(nn.Linear):
        pass

    pared.register(Own, rows={"weight": made(1)})
    pared.register(Own, rows={"weight": [made(0), 1]})


def test_numpy_numbers_reach_the_artifact_as_plain_data(tmp_path: Path) -> None:
    conf = PostTrainingQuantConfig(
        seed=np.int64(3), accuracy_criterion=AccuracyCriterion(tolerable_loss=np.float32(0.5)), quant_level=np.int64(0)
    )
    small = pared.fit(nn.Linear(8, 8), conf, [torch.randn(4, 8)], lambda _: np.float32(1), quiet=True)
    assert pared.load(pared.save(small, tmp_path), model=nn.Linear(8, 8)) is not None


# --- options that exclude each other


@pytest.mark.parametrize("bits", [8, 8.0, np.int64(8), 4])
def test_bits_and_max_size_exclude_each_other(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compress: bits and max_size exclude each other"):
        pared.compress(tmp_path / "m.pt", tmp_path, bits=bits, max_size=1000)
    found = CliRunner().invoke(app, ["compress", "m.pt", "-o", str(tmp_path), "--bits", str(bits), "--max-size", "1MB"])
    assert isinstance(found.exception, ConfigError)
    assert found.exception.what == "bits and max_size exclude each other"


def test_without_bits_the_artifact_is_that_of_eight(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4, 4)}, tmp_path / "m.pt")
    without = pared.compress(tmp_path / "m.pt", tmp_path / "a").read_bytes()
    assert without == pared.compress(tmp_path / "m.pt", tmp_path / "b", bits=8.0).read_bytes()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_another_engine_and_codes_in_memory_exclude_each_other(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"memory=\"small\" and engine='{engine}' exclude each other"):
        pared.load(tmp_path, engine=engine, memory="small")


@pytest.mark.parametrize("bits", [0.5, 8, 16, 32, np.int64(8)])
def test_bits_and_keep_exclude_each_other(bits: Any) -> None:
    with pytest.raises(ConfigError, match="needs either bits=... or keep=True"):
        Rule("a", bits=bits, keep=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "m.pt", "--quick", "--deep"], "--quick and --deep contradict each other"),
        *[
            (["fit", "a:b", "-o", "out", "--curve", *more], "--curve excludes")
            for more in (["--workspace", "w"], ["--confirm", "a:c"], ["--dry-run"])
        ],
    ],
)
def test_options_of_the_command_line_that_exclude_each_other(arguments: list[str], words: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, ConfigError)
    assert words in found.exception.what
