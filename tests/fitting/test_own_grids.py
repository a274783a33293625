"""Numbers that lie on a grid already, masks and indices: `fit` keeps them exactly, in as few bytes as `compress`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pared
from pared import ConfigError, PostTrainingQuantConfig, Rule

X = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))


def on_grid(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """A weight as fake quantization leaves it: a step for each row, or for each group of columns."""
    rows = weight.reshape(-1, group or weight.shape[1])
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / step).round() * step).reshape(weight.shape)


def build(bits: int, group: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to(dtype).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(on_grid(layer.weight.float(), bits, group))
            layer.bias.zero_()
    return model


def same(model: nn.Module, q: nn.Module) -> bool:
    return all(torch.equal(q.get_submodule(name).weight, model.get_submodule(name).weight) for name in ("0", "2"))


CONFIGS = {
    "eight bits": (PostTrainingQuantConfig(quant_level=0), [X]),
    "no data": (None, None),
    "a rule": (PostTrainingQuantConfig(rules=[Rule("*", bits=6)]), None),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(4, 0, torch.float32), (4, 32, torch.float32), (3, 0, torch.bfloat16)], ids=str
)
def test_weights_of_quantization_aware_training_stay_what_they_are(
    bits: int, group: int, dtype: torch.dtype, config: str, tmp_path: Path
) -> None:
    model = build(bits, group, dtype)
    conf, data = CONFIGS[config]
    q = pared.fit(model, conf, data and [x.to(dtype) for x in data], quiet=True)
    assert same(model, q)
    assert all("its numbers lie on this grid already: nothing is lost" in line.because for line in q.plan[::2])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    compressed = pared.compress(tmp_path / "model.pt", tmp_path / "c").stat().st_size
    file = pared.save(q, tmp_path)
    assert file.stat().st_size <= compressed + 512
    assert same(model, pared.load(tmp_path, build(bits, group, dtype)))


def test_a_size_for_which_the_grid_is_enough_loses_nothing(tmp_path: Path) -> None:
    model = build(4)
    exact = pared.save(pared.fit(model, quiet=True), tmp_path).stat().st_size
    conf = PostTrainingQuantConfig(max_size=exact + 64, approach="weight_only")
    assert same(model, pared.fit(model, conf, [X], quiet=True))


def test_a_coarser_rule_is_obeyed() -> None:
    q = pared.fit(build(8), PostTrainingQuantConfig(rules=[Rule("0", bits=3)]), quiet=True)
    assert len(q.state_dict()["0.weight"].unique()) < 40
    assert torch.equal(q[2].weight, build(8)[2].weight)


def test_the_search_takes_the_grid_where_that_is_best() -> None:
    model = build(2)
    with torch.no_grad():
        wanted = model(X)

    def loss(m: nn.Module) -> float:
        with torch.no_grad():
            return float((m(X) - wanted).square().mean())

    criterion = pared.AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=1e-9)
    conf = PostTrainingQuantConfig(approach="weight_only", accuracy_criterion=criterion)
    q = pared.fit(model, conf, [X], loss, quiet=True)
    assert q.met
    assert same(model, q)
    assert q.nbytes < 25_000  # 65,536 weights of less than two bits


@pytest.mark.parametrize("conf", [None, PostTrainingQuantConfig(quant_level=0), "no data"], ids=str)
def test_masks_of_pruning_stay_zeros_and_ones(conf: PostTrainingQuantConfig | str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.9)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    q = pared.fit(model, None, None, quiet=True) if isinstance(conf, str) else pared.fit(model, conf, [X], quiet=True)
    for name in ("0.weight_mask", "2.weight_mask"):
        assert torch.equal(q.get_buffer(name), model.get_buffer(name))


class Shuffled(nn.Module):
    """Tables of whole numbers that no gradient reaches, of every kind that people register."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("order", torch.stack([torch.randperm(512).float() for _ in range(2)]))
        self.register_buffer("far", torch.randint(0, 1 << 22, (2, 300)).double().float())
        self.register_buffer("line", torch.arange(2900.0, 3001.0))
        self.register_buffer("number", torch.tensor(4097.0))
        self.frozen = nn.Parameter(torch.randperm(500).reshape(2, 250).half(), requires_grad=False)
        self.register_buffer("one_hot", nn.functional.one_hot(torch.randint(0, 40, (30,)), 40).float())
        self.out = nn.Linear(1024, 64)

    def forward(self, x: Tensor) -> Tensor:
        shuffled = torch.cat([x[:, row.long()] for row in self.order], 1)
        return self.out(shuffled) + self.line.sum() * 0 + x[:, self.frozen.long()].sum() * 0


TABLES = ("order", "far", "line", "number", "frozen", "one_hot")


@pytest.mark.parametrize("conf", [None, PostTrainingQuantConfig(quant_level=0), "*", 16, "no data"], ids=str)
def test_whole_numbers_are_never_rounded(conf: object, tmp_path: Path) -> None:
    model, x = Shuffled().eval(), torch.randn(32, 512)
    if conf in ("*", 16):
        conf = PostTrainingQuantConfig(rules=[Rule("*", bits=4 if conf == "*" else 16)])
    q = pared.fit(model, *((None, None) if conf == "no data" else (conf, [x])), quiet=True)
    pared.save(q, tmp_path)
    for one in (q, pared.load(tmp_path, Shuffled().eval())):
        for name in TABLES:
            assert torch.equal(getattr(one, name), getattr(model, name)), name


@pytest.mark.parametrize("asked", [{}, {"bits": 4}, {"bits": 16}, {"max_size": 60_000}], ids=str)
def test_compress_does_not_round_whole_numbers_either(asked: dict[str, int], tmp_path: Path) -> None:
    model = Shuffled().eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    pared.compress(tmp_path / "model.pt", tmp_path / "c", **asked)
    loaded = pared.load(tmp_path / "c", Shuffled().eval())
    for name in TABLES:
        assert torch.equal(getattr(loaded, name), getattr(model, name)), name


def test_a_rule_that_would_round_indices_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="order: its whole numbers, which may be a mask or indices, are never rounded"
    ):
        pared.fit(Shuffled(), PostTrainingQuantConfig(rules=[Rule("order", bits=3)]))


def test_weights_that_training_changes_may_be_whole_numbers_and_coarser() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 4000).round())
    rule = Rule("weight", bits=3)
    q = pared.fit(layer, PostTrainingQuantConfig(rules=[rule]), quiet=True)
    assert not torch.equal(q.weight, layer.weight)
