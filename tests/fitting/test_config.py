from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, ConfigError, PostTrainingQuantConfig, Rule
from pared.fitting.config import INC_EQUIVALENTS
from pared.terminal import parse_size


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as error:
        PostTrainingQuantConfig(aproach="static")  # type: ignore[call-arg]  # the mistake under test
    assert str(error.value) == ("PostTrainingQuantConfig: unknown option 'aproach'\n  Did you mean 'approach'?")


@pytest.mark.parametrize("option", INC_EQUIVALENTS)
def test_options_of_inc_get_our_equivalent(option: str) -> None:
    with pytest.raises(ConfigError) as error:
        PostTrainingQuantConfig(**{option: {}})
    assert error.value.what == f"unknown option {option!r}"
    assert error.value.remedy == INC_EQUIVALENTS[option]


def test_an_option_like_no_other_gets_the_whole_list() -> None:
    with pytest.raises(ConfigError, match="The options are: higher_is_better, criterion, tolerable_loss."):
        AccuracyCriterion(zzz=1)  # type: ignore[call-arg]  # the mistake under test


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"approach": "statc"}, "approach='statc' is not one of 'auto', 'static', 'dynamic', 'weight_only'"),
        ({"device": "cuda"}, "device='cuda' is not one of 'cpu'"),
        ({"quant_level": 7}, "quant_level=7 is not one of 'auto', 0, 1"),
        (
            {"calibration_sampling_size": [100]},
            "calibration_sampling_size=[100] is not an integer of at least 1 and below 2^63",
        ),
        ({"max_trials": 0}, "max_trials=0 is not an integer of at least 1 and below 2^63"),
        ({"timeout": -1}, "timeout=-1 is not a number of at least 0 and below 2^63"),
        ({"seed": 1.5}, "seed=1.5 is not an integer of at least 0 and below 2^63"),
        ({"accuracy_criterion": 0.01}, "accuracy_criterion is a float"),
        ({"max_size": "12 parsecs"}, "'12 parsecs' is not a size"),
        ({"seed": 2**70}, f"seed={2**70} is not an integer of at least 0 and below 2^63"),
        ({"quant_level": True}, "quant_level=True is not one of 'auto', 0, 1"),
        ({"max_size": "0.4B"}, "'0.4B' is not a size"),
        ({"rules": ["encoder.*"]}, "'encoder.*' is not a Rule"),
    ],
)
def test_values_are_checked_when_they_are_given(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        PostTrainingQuantConfig(**options)
    assert error.value.what == words


@pytest.mark.parametrize("function", [pared.fit, pared.trade_off, pared.estimate])
def test_a_configuration_of_another_type_is_refused(function: Any) -> None:
    with pytest.raises(ConfigError, match="conf is a dict, not a configuration"):
        function(nn.Linear(2, 2), {"quant_level": 0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "a"}, "needs either bits=... or keep=True"),
        ({"target": "a", "bits": 4, "keep": True}, "needs either bits=... or keep=True"),
        ({"target": "a", "bits": 0}, "bits=0 is not a rate"),
        ({"target": "a", "bits": 20}, "bits=20 is not a rate"),
        ({"target": "a", "bits": True}, "bits=True is not a rate"),
        ({"target": "a", "keep": "yes"}, "needs either bits=... or keep=True"),
        ({"target": "a", "keep": True, "because": 3}, "because=3 is not text"),
        *(
            (
                {"target": target, "bits": 4},
                "the target is neither a name pattern, nor a module type, nor a function of a shape",
            )
            for target in ("", nn.Linear(2, 2))
        ),
        (
            {"target": 3, "bits": 4},
            "the target is neither a name pattern, nor a module type, nor a function of a shape",
        ),
        (
            {"target": int, "bits": 4},
            "the target is neither a name pattern, nor a module type, nor a function of a shape",
        ),
    ],
)
def test_rules_are_checked_when_they_are_made(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Rule(**arguments)
    assert error.value.what == words


def test_a_rule_takes_a_module_type() -> None:
    assert Rule(nn.LSTM, keep=True).label == "LSTM"
    assert Rule(torch.nn.Linear, bits=4).bits == 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("12MB", 12_000_000), ("1.5 KiB", 1536), ("7b", 7), (9, 9), ("2GiB", 2**31), ("1gb", 10**9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert PostTrainingQuantConfig(max_size=text).max_size == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0MB", 0, -1, True, "12Mb/s"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("criterion", "score", "baseline", "met"),
    [
        (AccuracyCriterion(tolerable_loss=0.01), 0.99, 1.0, True),
        (AccuracyCriterion(tolerable_loss=0.01), 0.989, 1.0, False),
        (AccuracyCriterion(tolerable_loss=0.01), 1.2, 1.0, True),
        (AccuracyCriterion(tolerable_loss=0.01, higher_is_better=False), 1.01, 1.0, True),
        (AccuracyCriterion(tolerable_loss=0.01, higher_is_better=False), 1.02, 1.0, False),
        # A negative baseline: relative to its magnitude, where others ask for more than the baseline itself.
        (AccuracyCriterion(tolerable_loss=0.01), -12.6, -12.6, True),
        (AccuracyCriterion(tolerable_loss=0.01), -12.7, -12.6, True),
        (AccuracyCriterion(tolerable_loss=0.01), -12.8, -12.6, False),
        (AccuracyCriterion(criterion="absolute", tolerable_loss=0.5), 9.5, 10.0, True),
        (AccuracyCriterion(criterion="absolute", tolerable_loss=0.5), 9.4, 10.0, False),
        (AccuracyCriterion(criterion="absolute", tolerable_loss=0, higher_is_better=False), 0.0, 0.0, True),
        (AccuracyCriterion(tolerable_loss=0), 0.3, 0.3, True),
    ],
)
def test_when_a_criterion_is_met(criterion: AccuracyCriterion, score: float, baseline: float, met: bool) -> None:
    assert criterion.met(score, baseline) is met


def test_a_zero_baseline_has_no_relative_loss() -> None:
    with pytest.raises(ConfigError) as error:
        AccuracyCriterion().loss(0.5, 0.0)
    assert str(error.value) == (
        "AccuracyCriterion: the baseline scores 0, so a relative loss has no meaning\n"
        '  Use AccuracyCriterion(criterion="absolute", ...), or --absolute on the command line.'
    )
