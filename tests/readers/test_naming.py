"""What wrappers and checkpoints put into names: compressed, loaded and compared as if it were not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import pared
from pared.readers.naming import HOLDERS, aligned, without_wrappers

State = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 8)), nn.BatchNorm1d(8))


def before(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def inside(part: str) -> Callable[[State], State]:
    """As if the inner Sequential were wrapped."""
    return lambda state: {
        name.replace("1.", f"1.{part}.", 1) if name.startswith("1.") else name: tensor for name, tensor in state.items()
    }


def both(one: Callable[[State], Any], other: Callable[[Any], Any]) -> Callable[[State], Any]:
    return lambda state: other(one(state))


# What a training run saves, by what it was made with.
SAVED: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "DataParallel, DistributedDataParallel": before("module."),
    "torch.compile": before("_orig_mod."),
    "torch.compile of a part": inside("_orig_mod"),
    "FSDP": before("_fsdp_wrapped_module."),
    "FSDP of parts": both(inside("_fsdp_wrapped_module"), before("_fsdp_wrapped_module.")),
    "FSDP of a part": inside("_fsdp_wrapped_module"),
    "activation checkpointing of a part": inside("_checkpoint_wrapped_module"),
    "FSDP and activation checkpointing": both(
        inside("_fsdp_wrapped_module._checkpoint_wrapped_module"), before("_fsdp_wrapped_module.")
    ),
    "compiled DistributedDataParallel": both(before("module."), before("_orig_mod.")),
    "DistributedDataParallel of compiled": both(before("_orig_mod."), before("module.")),
    "DistributedDataParallel of a part": inside("module"),
    "PEFT": before("base_model.model."),
    "PEFT in DistributedDataParallel": both(before("base_model.model."), before("module.")),
    "Lightning": lambda state: {"state_dict": before("model.")(state), "epoch": 3, "optimizer_states": []},
    "Lightning, another attribute": lambda state: {"state_dict": before("backbone.")(state)},
    "Lightning with torch.compile": lambda state: {"state_dict": before("model._orig_mod.")(state)},
    "DeepSpeed": lambda state: {"module": state, "optimizer": {}, "global_steps": 3},
    "DeepSpeed with DataParallel": lambda state: {"module": before("module.")(state)},
} | {f"in {name!r}": lambda state, name=name: {name: state} for name in HOLDERS}


@pytest.mark.parametrize("made", SAVED)
def test_what_wrappers_save_compresses_loads_and_compares(made: str, tmp_path: Path) -> None:
    model = network()
    torch.save(SAVED[made](model.state_dict()), tmp_path / "m.pt")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    path = pared.compress(tmp_path / "m.pt", tmp_path / "out")
    plain = pared.load(pared.compress(tmp_path / "plain.pt", tmp_path / "plain"), model=network())
    loaded = pared.load(path, model=network())
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), plain(x))
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    for a, b in ((tmp_path / "m.pt", tmp_path / "plain.pt"), (model, tmp_path / "m.pt")):
        found = pared.compare(a, b)
        assert (found.identical, found.alone, {pair.by for pair in found.pairs}) == (9, (), {"name"})


# Wrappers themselves, and what is left of them in names.
WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "checkpoint_wrapper": checkpoint_wrapper,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("part", [False, True], ids=["whole", "a part"])
@pytest.mark.slow
def test_real_wrappers(name: str, part: bool, tmp_path: Path) -> None:
    model = network()
    if part:
        model[1] = WRAPPERS[name](model[1])
    wrapped = model if part else WRAPPERS[name](model)
    torch.save(wrapped.state_dict(), tmp_path / "m.pt")
    loaded = pared.load(pared.compress(tmp_path / "m.pt", tmp_path / "out"), model=network())
    x = torch.randn(4, 24)
    assert torch.nn.functional.mse_loss(loaded(x), network().eval()(x)) < 1e-4
    assert pared.compare(wrapped, network()).identical == 9


def test_an_averaged_model_is_the_model(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    torch.save({"ema": averaged.state_dict()}, tmp_path / "m.pt")
    path = pared.compress(tmp_path / "m.pt", tmp_path / "out")
    plain = pared.load(path, model=network())
    again = pared.load(path, model=torch.optim.swa_utils.AveragedModel(network()))
    x = torch.randn(4, 24)
    assert torch.equal(plain(x), again(x))
    assert again.n_averaged == averaged.n_averaged
    assert "n_averaged" not in plain.state_dict()
    found = pared.compare(tmp_path / "m.pt", path)
    assert (found.alone, {pair.by for pair in found.pairs}) == ((), {"name"})


def test_of_two_copies_the_model_is_compared(tmp_path: Path) -> None:
    model = {f"module.{name}": tensor for name, tensor in network().state_dict().items()}
    averages = {name: tensor + 1 for name, tensor in model.items()}
    torch.save({"model_ema": averages, "model": model}, tmp_path / "m.pt")
    found = pared.compare(tmp_path / "m.pt", network())
    assert found.identical == 9
    assert {pair.by for pair in found.pairs} == {"name"}
    torch.save({"model": network().state_dict(), "model_ema": averages}, tmp_path / "n.pt")
    assert pared.compare(tmp_path / "m.pt", tmp_path / "n.pt").identical == 18


class WithModule(nn.Module):
    """A model that has parts with the names that wrappers use."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("names", [("module",), ("module", "head"), ("model",), ("base_model", "module"), ("net",)])
def test_a_model_with_parts_named_as_wrappers_loses_none(names: tuple[str, ...], tmp_path: Path) -> None:
    model = WithModule(*names)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = pared.load(pared.compress(tmp_path / "m.pt", tmp_path / "out"), model=WithModule(*names))
    assert set(model.state_dict()) <= set(loaded.state_dict())
    x = torch.randn(3, 8)
    assert torch.nn.functional.mse_loss(loaded(x), model(x)) < 1e-3


def test_a_model_that_was_fitted_in_a_wrapper_loads_without(tmp_path: Path) -> None:
    conf, data = pared.PostTrainingQuantConfig(approach="static", quant_level=0), [torch.randn(16, 24)]
    small = pared.fit(nn.DataParallel(network()), conf, data, quiet=True)
    path = pared.save(small, tmp_path)
    (tmp_path / "engine.json").unlink()  # what is fastest here
    plain, wrapped = pared.load(path, model=network()), pared.load(path, model=nn.DataParallel(network()))
    assert "int8 static" in pared.report(plain)
    assert torch.equal(plain(data[0]), wrapped(data[0]))
    assert [f"module.{name}" for name in plain.state_dict()] == list(wrapped.state_dict())


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (["a.weight"], ["b.weight"]),  # another layer
        (["a.weight", "b.weight"], ["weight"]),
        (["module.a.w", "a.w"], ["a.w"]),  # which of the two?
        (["x.a.w", "y.b.w"], ["a.w", "b.w"]),  # more than one prefix
        ([], ["w"]),
        (["w"], []),
    ],
)
def test_what_does_not_go_together_stays(held: list[str], wanted: list[str]) -> None:
    assert aligned(held, wanted) == {}


@pytest.mark.parametrize(
    "names", [["a._orig_mod.w", "a.w"], ["module.w", "w"], ["n_averaged", "module.n_averaged"], []]
)
def test_two_names_never_become_one(names: list[str]) -> None:
    assert without_wrappers(names) == names
