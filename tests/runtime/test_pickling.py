"""Deep copies and pickles of quantized models with modules that torch refuses to pickle, or with odd attributes."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pared
from pared import ModelError, PostTrainingQuantConfig
from pared.runtime.pickling.refusal import check_picklable
from tests.model.entangled import X, build, give, with_graph, wrapped


class Halved(nn.Module):
    """A parametrization of one's own, over two tensors."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a + b) / 2

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight + 0.1, weight - 0.1


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Halved())
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), parametrizations.weight_norm(nn.Conv1d(1, 4, 3), dim=2), nn.Flatten()
    ),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "two tensors": twice,
}


def saved(q: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(q, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), saved])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_are_copied_and_pickled(name: str, way: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), PARAMETRIZED[name]()).eval()
    q = pared.fit(model, PostTrainingQuantConfig(approach="dynamic"))
    again: Any = way(way(q))
    with torch.no_grad():
        assert torch.equal(again(X), q(X))
    assert again.state_dict().keys() == q.state_dict().keys()
    assert [parametrize.is_parametrized(one) for one in again] == [parametrize.is_parametrized(one) for one in q]
    assert isinstance(again, nn.Sequential)


@pytest.mark.parametrize("make", [threading.Lock, lambda: (with_graph(),), lambda: lambda x: x])
def test_deep_copies_of_quantized_models_with_odd_attributes(make: Callable[[], Any]) -> None:
    model = build()
    give(model[0], "held", make())
    q = pared.fit(model)
    box = {"model": q, "layer": q[0]}
    copied = copy.deepcopy(box)
    with torch.no_grad():
        assert torch.equal(copied["model"](X), q(X))
    assert copied["model"] is not q
    assert copied["layer"] is copied["model"][0]


def test_a_deep_copy_of_a_wrapped_model_is_independent() -> None:
    q = pared.fit(wrapped("decorated"))
    with torch.no_grad():
        expected = q(X)
        copied = copy.deepcopy(q)
        for tensor in copied.parameters():
            tensor.zero_()
        assert torch.equal(q(X), expected)
        assert torch.equal(copied(X), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (threading.Lock, "0.held: cannot be pickled (TypeError: cannot pickle '_thread.lock' object)"),
        (lambda: lambda x: x, "0.held: cannot be pickled"),
        (lambda: {"log": [open]}, ""),
    ],
)
def test_what_cannot_be_pickled_is_named(make: Callable[[], Any], words: str) -> None:
    model = build()
    give(model[0], "held", make())
    q = pared.fit(model)
    if not words:
        assert pickle.loads(pickle.dumps(q))[0].held == {"log": [open]}
        return
    for write in (pickle.dumps, lambda q: torch.save(q, io.BytesIO())):
        with pytest.raises(ModelError) as error:
            write(q)
        assert words in str(error.value)
        assert "pared.save(model, directory)" in error.value.remedy


class Aliased(nn.Module):
    """Reads its weight through a view in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.views = [self.layer.weight.data.T]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.views[0] + self.layer.bias


@pytest.mark.parametrize("approach", ["dynamic", "weight_only"])
def test_a_view_of_a_weight_follows_it(approach: str, tmp_path: Path) -> None:
    q = pared.fit(Aliased(), PostTrainingQuantConfig(approach=approach), [X], quiet=True)
    with torch.device("meta"):
        empty = Aliased()
    with torch.no_grad():
        for skeleton in (Aliased(), empty):
            assert torch.equal(pared.load(pared.save(q, tmp_path), model=skeleton)(X), q(X))
        assert torch.equal(copy.deepcopy(q)(X), q(X))
    with pytest.raises(ModelError, match="views: is a tensor in the memory of a weight, which it would no longer be"):
        pickle.dumps(q)


def test_a_class_that_cannot_be_imported_is_named() -> None:
    class Local(nn.Sequential):
        pass

    q = pared.fit(Local(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="Local: has a class or a part that cannot be pickled"):
        pickle.dumps(q)


def test_picklers_of_others_may_write_more() -> None:
    class Pickler(pickle._Pickler):
        """Writes what check_picklable would refuse, as cloudpickle does."""

        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            check_picklable(structure)
            super().save(obj, save_persistent_id)  # type: ignore[misc]  # typeshed lacks it

    structure = build()
    give(structure[0], "held", threading.Lock())
    Pickler(io.BytesIO()).dump(1)
    with pytest.raises(ModelError):
        check_picklable(structure)


def test_save_pretrained_says_what_to_do_instead() -> None:
    class Pretrained(nn.Sequential):
        def save_pretrained(self, directory: str) -> None:
            raise AssertionError(directory)

    q: Any = pared.fit(Pretrained(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match=r"save_pretrained would write codes(.|\n)*Use pared.save\(model, directory\)"):
        q.save_pretrained("anywhere")
