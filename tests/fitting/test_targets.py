"""What is chosen for another runtime: its formats only, its exact bytes, ties and rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig, Rule
from pared.errors import ConfigError, ParedError
from pared.formats.coded import Grouped
from pared.formats.groups.grid import GroupGrid
from pared.runtime.record import contents_of
from pared.targets import table
from pared.targets.target import Offer, Role, Target

_BOTH: frozenset[Role] = frozenset(("linear", "table"))


def offer(bits: int, group: int | None, *, roles: frozenset[Role] = frozenset(("linear",)), **more: Any) -> Offer:
    grid = GroupGrid(bits, group, **more)
    name = f"W{bits}{grid.zero[0]}"
    return Offer(name, grid, lambda rows, columns: -(-grid.nbits(rows, columns) // 8), group or 1, roles)


TOY = Target(
    "toy",
    "Toy, a runtime",
    "",
    (),
    (
        Offer("F16", "float16", lambda rows, columns: 2 * rows * columns, 1, _BOTH),
        offer(8, 16, roles=_BOTH),
        offer(5, 16, zero="least"),
        offer(4, 16, zero="code"),
        offer(4, 16),
        offer(3, 32, nested=2, multiple_bits=6, signed=True),
    ),
    (("q", "k"),),
    "graph",
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**table.TARGETS, "toy": TOY}
    monkeypatch.setattr("pared.runtime.summary.TARGETS", known)
    for place in ("config", "estimate", "verification.arguments", "search.free.choices"):
        monkeypatch.setattr(f"pared.fitting.{place}.TARGETS", known)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        y = self.out(torch.tanh(self.q(y)) * self.k(y))
        return x + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.odd = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.odd(x)
        return y


def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 4) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(40, (4, 12), generator=draw)


def conf(**options: Any) -> PostTrainingQuantConfig:
    return PostTrainingQuantConfig(target="toy", **options)


def fitted(score: Any = None, **options: Any) -> Any:
    return pared.fit(model(), conf(**options), list(batches()), score, quiet=True)


def offers(q: Any) -> dict[str, str]:
    return {stored.name: stored.decision.because for stored in contents_of(q).tensors}


@torch.no_grad()
def loss(q: nn.Module) -> float:
    exact, error = 0.0, 0.0
    for batch in batches(2):
        y = model()(batch)
        exact, error = exact + float(y.square().sum()), error + float((q(batch) - y).square().sum())
    return error / exact


def test_only_formats_of_the_runtime_are_chosen_and_ties_are_kept() -> None:
    for size in (19_500, 22_000, 26_000, 60_000):
        q = fitted(max_size=size)
        found = {stored.name: stored for stored in contents_of(q).tensors}
        names = {one.name for one in TOY.offers}
        for name, stored in found.items():
            if name.endswith("weight") and "norm" not in name:
                assert stored.decision.because in names
                assert not isinstance(stored.coded.format, Grouped) or stored.coded.format.grid in [
                    one.grid for one in TOY.offers
                ]
            else:
                assert stored.decision.treatment == "exact"
        for i in range(2):
            q_and_k = {found[f"blocks.{i}.{part}.weight"].decision.because for part in "qk"}
            assert len(q_and_k) == 1
        assert found["table.weight"].decision.because in ("F16", "W8f")


def exact_nbytes(q: Any) -> int:
    by_name = {one.name: one for one in TOY.offers}
    total = 0
    for stored in contents_of(q).tensors:
        shape = stored.coded.shape
        own = by_name.get(stored.decision.because)
        total += own.nbytes(*shape) if own else stored.coded.nbytes
    return total


def test_bytes_are_those_of_the_runtime_and_more_of_them_lose_less() -> None:
    losses = []
    for size in (19_500, 22_000, 26_000, 60_000):
        q = fitted(max_size=size)
        assert 0.6 * size < exact_nbytes(q) < size
        losses.append(loss(q))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-4 < losses[0]


def test_the_smallest_file_is_named_where_there_is_none_as_small() -> None:
    with pytest.raises(ConfigError, match="the smallest file takes"):
        fitted(max_size=1_000)


def test_the_report_names_the_runtime_and_its_formats(tmp_path: Path) -> None:
    q = fitted(max_size=22_000)
    assert "tensors in the formats of Toy, a runtime: " in q.report()
    assert "in W8f" in q.report()
    pared.save(q, tmp_path)
    assert "formats of Toy" in pared.load(tmp_path, model()).report()


def test_a_search_scores_models_in_the_runtimes_formats() -> None:
    q = fitted(lambda candidate: 1 - loss(candidate), max_trials=4)
    assert q.pared.met
    assert {"W4f", "W4c", "W5l", "W3f"} & set(offers(q).values())
    smallest = min(trial.nbytes for trial in q.pared.trials)
    assert smallest < 30_000, "bytes of the runtime's file"


def test_the_curve_has_bytes_of_the_runtime() -> None:
    curve = pared.trade_off(model(), conf(), list(batches()), points=4, quiet=True)
    sizes = [point.nbytes for point in curve.points]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 70_000


@pytest.mark.parametrize("calibrated", [True, False])
def test_without_a_wish_everything_is_at_eight_bits(calibrated: bool) -> None:
    options = {"quant_level": 0} if calibrated else {}
    q: Any = pared.fit(model(), conf(**options), list(batches()) if calibrated else None, quiet=True)
    weights = {because for name, because in offers(q).items() if name.endswith("weight") and "norm" not in name}
    assert weights == {"W8f"}


def test_an_estimate_is_of_the_runtimes_file() -> None:
    guess = pared.estimate(model(), conf())
    small = pared.estimate(model(), conf(rules=[Rule("blocks.*", bits=4)]))
    q = fitted(quant_level=0)
    assert exact_nbytes(q) < guess.nbytes < exact_nbytes(q) + 5_000
    assert small.nbytes < 0.8 * guess.nbytes


def test_rules_choose_the_finest_format_within_their_bits() -> None:
    rules = [Rule("blocks.0.*", bits=4), Rule("odd", keep=True, because="it is odd"), Rule("table", bits=16)]
    found = offers(fitted(max_size=40_000, rules=rules))
    assert found["blocks.0.q.weight"] == found["blocks.0.out.weight"] == "W4c; rule 'blocks.0.*'"
    assert found["odd.weight"] == "it is odd"
    assert found["table.weight"] == "F16; rule 'table'"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a tie": ({"rules": [Rule("*.q", bits=4)]}, r"blocks.0.q.weight, and not about blocks.0.k.weight, which must"),
    "too few bits": ({"rules": [Rule("table", bits=4)]}, "no format of at most 4 bits for table.weight, which has 40"),
    "nothing to choose": ({"rules": [Rule("*.norm", bits=8)]}, "no tensor that it matches can have bits=8"),
    "an unknown target": ({"target": "tyo"}, "'tyo'"),
    "an approach": ({"approach": "static"}, "toy"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_refused_before_any_work(wrong: str) -> None:
    options, message = WRONG[wrong]
    called: list[Any] = []
    with pytest.raises(ParedError, match=message):
        pared.fit(model(), PostTrainingQuantConfig(**{"target": "toy", **options}), called.append, quiet=True)
    assert not called


class Experts(Net):
    """One with a stack of matrices, as models hold experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 64, 64) / 8)
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "mixtral"})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y: Tensor = self.odd(torch.einsum("bti,eio->bto", x, self.experts))
        return y


def test_stacks_of_matrices_are_named(caplog: pytest.LogCaptureFixture) -> None:
    q = pared.fit(Experts(), PostTrainingQuantConfig(target="mlx", quant_level=0), list(batches()), quiet=True)
    assert "mlx has no format for stacks of matrices: experts and 0 more stay as they are, 49,152 of " in caplog.text
    assert offers(q)["experts"] == "mlx has no format for stacks of matrices"


class Configured(Net):
    """One that says what it is, as models of transformers do."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: config)


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("mlx", None, "a Net has no configuration .*\n  Known are those of transformers.*: onnx, openvino"),
        ("gguf", None, "a Net has no configuration .*\n  Known are LlamaForCausalLM, MistralForCausalLM"),
        ("gguf", {"architectures": ["Odd"]}, "the architecture Odd is not known\n  Known are LlamaForCausalLM"),
        ("gguf", {"model_type": "x"}, "the architecture Configured is not known"),
        ("mlx", {"model_type": "t5"}, "mlx-lm has no loader for models of type t5\n  Use the target"),
        ("mlx", {"model_type": "gpt2"}, "models of type gpt2 store their matrices transposed"),
        ("gptq", {"model_type": "gpt2"}, "models of type gpt2 store their matrices transposed"),
    ],
)
def test_a_model_that_a_runtime_does_not_run_is_refused_before_any_work(
    target: str, config: dict[str, Any] | None, message: str
) -> None:
    net = Net() if config is None else Configured(config)
    called: list[Any] = []
    wanted = PostTrainingQuantConfig(target=target)
    for verb in (pared.fit, pared.trade_off):
        with pytest.raises(ConfigError, match=message):
            verb(net, wanted, called.append, quiet=True)
    with pytest.raises(ConfigError, match=message):
        pared.estimate(net, wanted, called.append)
    assert not called


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(TOY, extra="toys", packages=("no_such_package",))
    monkeypatch.setattr("pared.fitting.verification.arguments.TARGETS", {"toy": missing})
    with pytest.raises(ConfigError, match=r"no_such_package.*not installed") as caught:
        pared.fit(model(), conf(), list(batches()), quiet=True)
    assert "pip install 'pared[toys]'" in str(caught.value)
