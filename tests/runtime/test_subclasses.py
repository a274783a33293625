"""The classes that a user's modules get: what they are called, that they are shared, and that they go."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.formats.views import OWN_ROWS
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.layers.subclasses import Mixin, class_below, subclass_of
from pared.runtime.layers.table import LAYERS
from pared.runtime.quantized import Quantized
from pared.runtime.serving.served import Served

pytestmark = pytest.mark.slow


class Own(nn.Linear):
    """A layer of the user's own."""


def test_a_subclass_bears_the_name_of_the_class_and_is_made_once() -> None:
    made = subclass_of(Own, Counterpart, ("weight",), lambda: {"extra": 3})
    assert (made.__name__, made.__qualname__, made.__module__, made.__doc__) == (
        *("Own", "Own", __name__),
        "A layer of the user's own.",
    )
    assert made.__dict__["extra"] == 3
    assert subclass_of(Own, Counterpart, ("weight",), pytest.fail) is made
    assert subclass_of(Own, Counterpart, ("weight", "bias")) is not made
    assert subclass_of(nn.Linear, Counterpart, ("weight",)) is not made


def test_mixins_come_off_one_by_one() -> None:
    counterpart = subclass_of(Own, Counterpart)
    served = subclass_of(counterpart, Served)
    whole = subclass_of(served, Quantized)
    assert class_below(whole, Served) is counterpart
    assert class_below(counterpart, Counterpart) is Own
    assert class_below(whole) is Own
    assert class_below(Own) is Own


def redefined() -> tuple[nn.Module, weakref.ref[type]]:
    """A model as a notebook defines it, each time with another class."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x).relu()
            return out

    return Net().eval(), weakref.ref(Net)


def classes() -> set[type]:
    """All classes of ours for modules that are alive."""
    gc.collect()
    waiting: list[type] = [Mixin]
    found: set[type] = set()
    while waiting:
        known = waiting.pop()
        found.add(known)
        waiting += known.__subclasses__()
    return found


def test_no_class_of_the_user_is_held_when_its_models_are_gone() -> None:
    batches = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0))]
    before = classes()
    seen = []
    for _ in range(3):
        model, known = redefined()
        q = pared.fit(model, PostTrainingQuantConfig(quant_level=0), batches)
        assert isinstance(q, type(model))
        seen.append(known)
    assert len(classes() - before) > 0
    del model, q
    assert {cls.__qualname__ for cls in classes() - before} <= {"Linear"}
    assert [known() for known in seen] == [None, None, None]


def test_no_class_is_held_because_it_was_registered() -> None:
    model, known = redefined()
    pared.register(type(model), rows={"weight": 1}, int8=["weight"])
    assert type(model) in LAYERS
    assert type(model) in OWN_ROWS
    before = len(LAYERS), len(OWN_ROWS)
    del model
    gc.collect()
    assert known() is None
    assert (len(LAYERS), len(OWN_ROWS)) == (before[0] - 1, before[1] - 1)
