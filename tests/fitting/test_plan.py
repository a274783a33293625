import re

import pytest
import torch
from torch import nn

from pared import ConfigError, Rule
from pared.fitting.rounding.encoding import encode, sample_cost
from pared.fitting.rounding.plan import make_plan
from pared.model.contents import Decision
from pared.model.tensors import find_tensors


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # some random weights are so small that float16 loses them
        self.encoder = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 8)
        self.register_buffer("mask", torch.tensor([[0.0, float("-inf")], [0.0, 0.0]]))
        self.register_buffer("table", torch.randn(16, 64))
        self.register_buffer("made", torch.randn(16, 64), persistent=False)
        self.register_buffer("wide", torch.randn(4, 4, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(3))


def plan(*rules: Rule, strict: bool = False, bits: float = 8) -> dict[str, Decision]:
    model = Model()
    return {d.name: d for d in make_plan(find_tensors(model), rules, strict=strict, bits=bits)}


def test_what_is_decided_without_rules() -> None:
    decided = plan()
    assert (decided["encoder.0.weight"].treatment, decided["encoder.0.weight"].bits) == ("grid", 8)
    assert decided["table"].treatment == "grid"
    assert decided["norm.weight"].treatment == "float16"
    for name, reason in {
        "mask": "a buffer that holds NaN or infinities",
        "made": "a buffer that the state dict leaves out",
        "wide": "float64 is kept exactly",
        "steps": "int64 is kept exactly",
    }.items():
        assert (decided[name].treatment, decided[name].because) == ("exact", reason)


def test_the_first_rule_that_matches_decides() -> None:
    decided = plan(Rule("encoder.1.*", bits=3), Rule("encoder.*", bits=5), Rule(nn.Linear, keep=True, because="mine"))
    assert decided["encoder.0.weight"].bits == 5
    assert decided["encoder.1.weight"].bits == 3
    assert (decided["head.weight"].treatment, decided["head.weight"].because) == ("exact", "mine")
    assert decided["head.bias"].treatment == "exact"
    assert decided["encoder.1.bias"].treatment == "float16"  # a bias has no rate


@pytest.mark.parametrize("target", ["encoder.0", "encoder.0.weight", "*.0", "encoder.[0]*", nn.ModuleList])
def test_ways_to_name_a_tensor(target: str) -> None:
    assert plan(Rule(target, bits=4))["encoder.0.weight"].bits == 4


def test_bits_16_and_32() -> None:
    decided = plan(Rule("head", bits=16), Rule("encoder.0", bits=32))
    assert decided["head.weight"].treatment == "float16"
    assert decided["encoder.0.weight"].treatment == "float32"


def test_values_that_do_not_survive_float16_stay_exact() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = 1e6
        model.bias[0] = 1e-7
    decided = {d.name: d for d in make_plan(find_tensors(model), [Rule("weight", bits=16)])}
    assert decided["weight"].treatment == "exact"
    assert "do not survive float16" in decided["weight"].because
    assert decided["bias"].treatment == "exact"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("encodr.0.weight", bits=4),
            "Rule('encodr.0.weight'): matches no tensor of the model\n"
            "  The nearest names are: encoder.0.weight, encoder.1.weight, norm.weight.",
        ),
        (
            Rule(nn.LSTM, keep=True),
            "Rule(LSTM): matches no tensor of the model\n"
            "  The nearest names are: LayerNorm, Linear, Model, ModuleList.",
        ),
    ],
)
def test_a_rule_without_match_names_the_nearest(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(rule)
    assert str(error.value) == message


def test_a_rule_hidden_by_an_earlier_one_is_no_error() -> None:
    assert plan(Rule("*", bits=4), Rule("head", bits=2))["head.weight"].bits == 4


def test_strict_lists_what_would_stay_in_float() -> None:
    with pytest.raises(ConfigError, match=re.escape("mask (16 bytes: a buffer that holds NaN or infinities)")):
        plan(strict=True)
    because = [Rule(name, keep=True) for name in ("mask", "made", "wide")]
    assert plan(*because, strict=True)["mask"].treatment == "exact"


@pytest.mark.parametrize("bits", [3, 8, 10])
def test_a_guess_is_near_what_rounding_gives(bits: float) -> None:
    model = nn.Linear(700, 900)
    model_tensor = find_tensors(model).tensors[0]
    decision = Decision("weight", "grid", bits, "")
    guess = sample_cost(model_tensor, decision, 64)
    assert guess.sampled == 64 * 700
    assert guess.nbytes == pytest.approx(encode(model_tensor, decision).nbytes, rel=0.02)
