"""Weights that a module divides by their norm never become zeros, of which the norm would be 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm

import pared
from pared import PostTrainingQuantConfig, Rule
from pared.fitting.rounding.targets import ceilings, without_empty_slices
from pared.formats.views import View
from pared.model.tensors import find_tensors

pytestmark = pytest.mark.slow


class UnitRows(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1)[:, None, None]


def parametrized(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", UnitRows())
    return module


NORMED: list[Callable[[nn.Module], nn.Module]] = [
    parametrizations.weight_norm,
    lambda module: parametrizations.weight_norm(module, dim=1),
    lambda module: parametrizations.weight_norm(module, dim=None),
    parametrizations.spectral_norm,
    pytest.param(old_weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")),  # type: ignore[list-item]
    nn.utils.spectral_norm,
    parametrized,
]


class Branch(nn.Module):
    """A branch that adds almost nothing, so that its weights are not worth a bit."""

    def __init__(self, normed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.main, self.branch = nn.Conv1d(8, 8, 3, padding=1), normed(nn.Conv1d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + 0.003 * self.branch(x)
        return y


def lost(model: nn.Module, q: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
        return float((q(x) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("normed", NORMED)
@pytest.mark.parametrize("rules", [(), (Rule("branch.*", bits=0.2),)])
def test_a_normed_direction_is_never_zeros(normed: Callable[[nn.Module], nn.Module], rules: tuple[Rule, ...]) -> None:
    torch.manual_seed(0)
    model = Branch(normed).eval()
    data = [torch.randn(8, 8, 50) for _ in range(4)]
    q = pared.fit(model, PostTrainingQuantConfig(rules=rules), data, quiet=True)
    assert lost(model, q, data[0]) < 2e-3


def test_the_tensors_that_are_divided_by_norms() -> None:
    found = {t.name: t.normed for t in find_tensors(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)))}
    assert found["parametrizations.weight.original1"] == (0,)
    assert found["bias"] is None
    assert [
        t.normed for t in find_tensors(nn.utils.spectral_norm(nn.Linear(4, 6))) if t.attribute == "weight_orig"
    ] == [()]
    assert {t.normed for t in find_tensors(nn.Linear(4, 6))} == {None}


def test_slices_that_are_not_rows() -> None:
    tensor = torch.tensor([[1.0, 0.01, 0.0], [2.0, 0.02, 0.0]])
    ceiling = ceilings(tensor, View((2, 3), (0,)), (1,))
    assert ceiling is not None
    assert ceiling.tolist() == pytest.approx([0.02, 0.02]), "the column of zeros may stay zeros"
    codes = torch.tensor([[1, 0, 0], [2, 0, 0]], dtype=torch.int8)
    assert without_empty_slices(codes, tensor, (1,)).tolist() == [[1, 0, 0], [2, 1, 0]]
    assert without_empty_slices(codes, tensor, ()).tolist() == codes.tolist()
    assert without_empty_slices(torch.zeros_like(codes), -tensor, ()).tolist() == [[0, 0, 0], [-1, 0, 0]]
    assert without_empty_slices(codes, tensor, None) is codes
