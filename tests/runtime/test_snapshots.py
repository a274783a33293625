"""What is looked at before anything stands in for a model's modules, at every call."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pared.model.recorded.state import Attributes
from pared.runtime.serving.server import ModelSnapshot, _Parameters


class _Own(nn.Module):
    """Holds an attribute, and a buffer that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.register_buffer("unused", None)


def build() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)), _Own())
    return model.eval().requires_grad_(requires_grad=False)


def replace_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones(3, 3))


def write_to_weight(model: nn.Sequential) -> None:
    model[2][0].bias.data.zero_()
    with torch.no_grad():
        model[0].weight.add_(1)


def write_to_buffer(model: nn.Sequential) -> None:
    model[1].running_mean.add_(1)


def drop_bias(model: nn.Sequential) -> None:
    model[0].register_parameter("bias", None)


def replace_module(model: nn.Sequential) -> None:
    model[2][0] = nn.Linear(3, 2)


def train_one(model: nn.Sequential) -> None:
    model[1].training = True


def hook(model: nn.Sequential) -> None:
    model[2].register_forward_hook(lambda *_: None)


def pre_hook(model: nn.Sequential) -> None:
    model[1].register_forward_pre_hook(lambda *_: None)


def replace_hooks(model: nn.Sequential) -> None:
    model[1]._forward_hooks = {0: print}  # as some libraries do


def hook_of_all(_: nn.Sequential) -> None:
    nn.modules.module.register_module_forward_hook(lambda *_: None)


def hook_outside(model: nn.Sequential) -> None:
    model.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [replace_weight, write_to_weight, write_to_buffer, drop_bias])
def test_other_numbers_are_noticed(change: Callable[[nn.Sequential], None]) -> None:
    model = build()
    snapshot = ModelSnapshot(model)
    assert snapshot.is_current()
    change(model)
    assert not snapshot.is_current()
    assert snapshot.is_undisturbed()


@pytest.mark.parametrize("change", [replace_module, train_one, hook, pre_hook, replace_hooks, hook_of_all])
def test_what_disturbs_a_model_is_noticed(
    change: Callable[[nn.Sequential], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", OrderedDict())
    model = build()
    snapshot = ModelSnapshot(model)
    assert snapshot.is_undisturbed()
    change(model)
    assert not snapshot.is_undisturbed()


def test_hooks_that_come_and_go_disturb_only_meanwhile_and_those_of_the_model_itself_never() -> None:
    model = build()
    snapshot = ModelSnapshot(model)
    handle = model[0].register_forward_hook(lambda *_: None)
    assert not snapshot.is_undisturbed()
    handle.remove()
    model.train()
    assert not snapshot.is_undisturbed()
    model.eval()
    hook_outside(model)
    assert snapshot.is_undisturbed()


def test_tensors_whose_writes_torch_does_not_count_can_be_held() -> None:
    with torch.inference_mode():
        model = build()
        snapshot = ModelSnapshot(model)
    assert snapshot.is_current()


@pytest.mark.parametrize(
    "change", [lambda m: m[0].requires_grad_(), replace_module, lambda m: m.append(nn.Linear(2, 2))]
)
def test_parameters_that_want_gradients_are_noticed(change: Callable[[nn.Sequential], None]) -> None:
    model = build()
    known = _Parameters(model)
    assert known.are_current()
    assert not known.want_gradients()
    change(model)
    assert not known.are_current() or known.want_gradients()
    assert _Parameters(model).want_gradients()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda own: setattr(own, "scale", 3.0), "scale"),
        (lambda own: setattr(own, "scale", 2.0 * 1), ""),  # an equal number
        (lambda own: delattr(own, "scale"), "scale"),
        (lambda own: setattr(own, "more", 1), "more"),
        (lambda own: own.eval(), ""),
    ],
)
def test_attributes_that_were_set_are_named(change: Callable[[nn.Module], None], name: str) -> None:
    model = build()
    attributes = Attributes(model.modules())
    assert attributes.changed() == ""
    change(model[3])
    assert attributes.changed() == name
