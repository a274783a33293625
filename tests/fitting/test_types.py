"""Tensors of other types than float32: float64 is compressed as float32 is, and a rule is obeyed or is an error."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pared
from pared import ConfigError, PostTrainingQuantConfig, Rule


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.BatchNorm1d(256), nn.Linear(256, 64)).eval().double()


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def decibels(model: nn.Module, q: nn.Module) -> float:
    with torch.no_grad():
        wanted, found = model(X), q(X)
    assert found.dtype == torch.float64
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.mark.parametrize(
    ("conf", "nbytes", "least"),
    [
        (PostTrainingQuantConfig(), 30_000, 29),
        (PostTrainingQuantConfig(quant_level=0), 40_000, 40),
        (PostTrainingQuantConfig(approach="dynamic", quant_level=0), 40_000, 40),
        (PostTrainingQuantConfig(rules=[Rule("*", bits=8)]), 40_000, 30),
        (PostTrainingQuantConfig(rules=[Rule("*", bits=16)]), 140_000, 60),
        (PostTrainingQuantConfig(rules=[Rule(nn.Linear, bits=4)]), 24_000, 20),
        (PostTrainingQuantConfig(max_size="30kB"), 30_000, 30),
    ],
    ids=str,
)
def test_a_model_in_double_precision_is_compressed(
    conf: PostTrainingQuantConfig, nbytes: int, least: float, tmp_path: Path
) -> None:
    model = build()
    q = pared.fit(model, conf, [X], quiet=True)
    assert pared.save(q, tmp_path).stat().st_size < nbytes
    loaded = pared.load(tmp_path, build())
    for one in (q, loaded):
        assert decibels(model, one) > least
        assert one[0].weight.dtype == one[2].running_mean.dtype == torch.float64
    assert torch.equal(loaded(X), q(X))


def test_without_data_double_precision_is_compressed_like_single(tmp_path: Path) -> None:
    sizes = [pared.save(pared.fit(model, quiet=True), tmp_path).stat().st_size for model in (build(), build().float())]
    assert sizes[0] < sizes[1] + 4096  # the statistics of the BatchNorm, which are kept exactly


def test_double_precision_beside_narrower_weights_is_kept_unless_a_rule_names_it() -> None:
    model = nn.ModuleDict({"net": nn.Linear(64, 64), "physics": nn.Linear(16, 16).double()})
    plan = {line.name: line for line in pared.fit(model, quiet=True).plan}
    assert (plan["physics.weight"].treatment, plan["physics.weight"].because) == ("exact", "float64 is kept exactly")
    ruled = pared.fit(model, PostTrainingQuantConfig(rules=[Rule("physics", bits=6)]), quiet=True)
    assert {line.name: line.treatment for line in ruled.plan}["physics.weight"] == "grid"


def test_double_precision_that_float32_cannot_hold_is_kept() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)]).double()
    with torch.no_grad():
        model[0].weight.mul_(1e200)
        model[1].weight.mul_(1e-200)
    q = pared.fit(model, quiet=True)
    assert all(torch.equal(q[i].weight, model[i].weight) for i in range(2))
    assert q.plan[0].because == "its values are beyond what a grid can hold"


LOWEST = torch.finfo(torch.float32).min
FAR = {
    "weights and a mask": torch.randn(32, 32).masked_fill(torch.eye(32) > 0, LOWEST),
    "large": torch.randn(32, 32) * 1e37,
    "larger than their squares": torch.randn(32, 32) * 1e25,
    "in bfloat16": (torch.randn(32, 32) * 1e37).bfloat16(),
    "tiny": torch.randn(32, 32) * 1e-37,
    "denormal": torch.randn(32, 32) * 1e-41,
    "tiny in double precision": torch.randn(32, 32).double() * 1e-300,
    "a flat one": torch.randn(64) * 1e30,
    "a mask": torch.full((32, 32), LOWEST).triu(1),
}


class Table(nn.Module):
    def __init__(self, table: Tensor, *, is_parameter: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)
        self.register_buffer("table", None if is_parameter else table)
        self.own = nn.Parameter(table) if is_parameter else None

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.own is None else self.own
        return self.linear(x) + table.sign().float().mean()


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("is_parameter", [False, True])
def test_numbers_that_no_grid_can_hold_are_kept(name: str, is_parameter: bool, tmp_path: Path) -> None:
    model, x = Table(FAR[name], is_parameter=is_parameter).eval(), torch.randn(8, 32)
    kept = "own" if is_parameter else "table"
    for conf, data in ((None, [x]), (PostTrainingQuantConfig(quant_level=0), [x]), (None, None)):
        q = pared.fit(model, conf, data, quiet=True)
        pared.save(q, tmp_path)
        loaded = pared.load(tmp_path, model=Table(FAR[name], is_parameter=is_parameter))
        assert torch.equal(getattr(q, kept), FAR[name])
        assert torch.equal(getattr(loaded, kept), FAR[name])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", FAR)
def test_compress_rounds_large_numbers_and_keeps_those_that_no_grid_can_hold(
    name: str, bits: float, tmp_path: Path
) -> None:
    torch.save({"table": FAR[name]}, tmp_path / "source.pt")
    pared.compress(tmp_path / "source.pt", tmp_path, bits=bits)
    pared.expand(tmp_path, tmp_path / "again.safetensors")
    found = safetensors.torch.load_file(tmp_path / "again.safetensors")["table"]
    if name in ("large", "in bfloat16", "larger than their squares"):  # no squares are taken in float32
        error = (found.double() - FAR[name].double()).square().sum() / FAR[name].double().square().sum()
        assert error < 0.05
    else:
        assert torch.equal(found, FAR[name])


class Mixed(nn.Module):
    """One tensor of every kind that a rate is not for, beside one that it is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spectrum = nn.Parameter(torch.randn(64, 64, dtype=torch.cfloat))
        self.table = nn.Embedding(100, 64, max_norm=1.0)
        self.out = nn.Linear(64, 64)
        self.counts = nn.Parameter(torch.arange(64).reshape(8, 8), requires_grad=False)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("window", torch.randn(64, 64), persistent=False)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf))
        self.register_buffer("flags", torch.ones(4, 4, dtype=torch.bool))
        self.register_buffer("offsets", torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(
            self.out((x.to(torch.cfloat) @ self.spectrum).real + x @ self.window + self.table.weight[0])
        )
        return y


REASONS = {
    "spectrum": "complex64 has no coarser format",
    "table.weight": "its module edits it while reading it (max_norm)",
    "counts": "int64 has no coarser format",
    "window": "the state dict leaves it out",
    "mask": "it holds NaN or infinities",
    "flags": "bool has no coarser format",
    "offsets": "only weights of two or more dimensions have a rate",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_rule_that_nothing_can_follow_is_an_error_that_says_why(name: str) -> None:
    message = f"Rule('{name}'): no tensor that it matches can have bits=8 ({name}: {REASONS[name]})"
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        pared.fit(Mixed(), PostTrainingQuantConfig(rules=[Rule(name, bits=8)]))
    assert error.value.remedy == "Use keep=True, or leave the rule out: they are then stored without loss."
    kept = pared.fit(Mixed(), PostTrainingQuantConfig(rules=[Rule(name, keep=True, because="mine")]), quiet=True)
    assert {line.name: line.because for line in kept.plan}[name] == "mine"


@pytest.mark.parametrize("rule", [Rule(nn.Embedding, bits=4), Rule(lambda shape: shape == (4, 4), bits=16)])
def test_a_rule_by_type_or_shape_too(rule: Rule) -> None:
    if rule.bits == 16:  # a mask can be float16: the rule is not idle
        assert {line.name: line.treatment for line in pared.fit(Mixed(), PostTrainingQuantConfig(rules=[rule])).plan}[
            "mask"
        ] == "float16"
        return
    with pytest.raises(ConfigError, match=re.escape("(table.weight: its module edits it while reading it (max_norm))")):
        pared.fit(Mixed(), PostTrainingQuantConfig(rules=[rule]))


def test_a_wildcard_decides_what_can_follow_it_and_the_report_says_why_the_rest_cannot() -> None:
    model, x = Mixed().eval(), torch.randn(8, 64)
    q = pared.fit(model, PostTrainingQuantConfig(rules=[Rule("*", bits=4)]), [x], quiet=True)
    plan = {line.name: line for line in q.plan}
    assert (plan["out.weight"].treatment, plan["out.weight"].bits) == ("grid", 4)
    assert {name: plan[name].because for name in REASONS if name != "offsets"} == {
        "spectrum": "complex64 is kept exactly",
        "table.weight": "its module edits it while reading it (max_norm)",
        "counts": "int64 is kept exactly",
        "window": "a buffer that the state dict leaves out",
        "mask": "a buffer that holds NaN or infinities",
        "flags": "bool is kept exactly",
    }


def test_a_rule_for_nothing_but_biases_is_obeyed() -> None:
    q = pared.fit(Mixed(), PostTrainingQuantConfig(rules=[Rule("norm", bits=5), Rule("out.bias", bits=3)]), quiet=True)
    plan = {line.name: line for line in q.plan}
    assert (plan["norm.weight"].treatment, plan["norm.weight"].bits) == ("grid", 5)
    assert (plan["out.bias"].treatment, plan["out.bias"].bits) == ("grid", 3)
    assert len(q.out.bias.unique()) <= 12


def test_a_rule_whose_tensors_an_earlier_one_keeps_is_no_error() -> None:
    rules = [Rule("table", keep=True), Rule(nn.Embedding, bits=4)]
    assert pared.fit(Mixed(), PostTrainingQuantConfig(rules=rules), quiet=True).plan[1].treatment == "exact"
