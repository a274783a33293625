"""The second moments of inputs, and what they are worth beside those of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.inputs.moments import input_moments, with_inputs
from pared.fitting.rounding.importance import make_target
from pared.formats.views import View
from pared.model.calls import Call
from pared.model.tensors import find_tensors
from tests.fitting.test_feedback import correlated


class Shared(nn.Module):
    """Two layers with one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.a(x) * self.b(x))
        return y


def test_moments_are_those_of_all_inputs_and_shared_where_inputs_are() -> None:
    torch.manual_seed(0)
    model = Shared()
    inputs = [torch.randn(2, 5, 6), torch.randn(1, 7, 6)]
    found = input_moments(find_tensors(model), [Call((x,), {}) for x in inputs])
    assert set(found) == {"a.weight", "b.weight", "c.weight"}
    x = torch.cat([one.reshape(-1, 6) for one in inputs])
    assert torch.allclose(found["a.weight"], x.T @ x, atol=1e-4)
    assert found["a.weight"] is found["b.weight"], "one sum takes half the memory"
    y = (model.a(x) * model.b(x)).detach()
    assert torch.allclose(found["c.weight"], y.T @ y, atol=1e-4)


def test_moments_join_those_of_gradients_where_shapes_agree() -> None:
    with_moments = TensorStats(torch.ones(4), torch.ones(1, 6, 6))
    cut = TensorStats(torch.ones(4), torch.ones(2, 3, 3), layout=Blocks(1, 2))
    found = with_inputs(Sensitivity({"a": with_moments, "b": cut}), {"a": torch.eye(6), "b": torch.eye(6)}).tensors
    assert found["a"].inputs is not None
    assert found["a"].inputs.shape == (1, 6, 6)
    assert found["b"].inputs is None


class TwoUses(nn.Module):
    """An attention's projections, called with one input and then with two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        own: Tensor = self.q(x) + self.k(x)
        twice: Tensor = self.q(x) + self.k(y) + self.v(y) + self.v(y)
        return own + twice


def test_what_shares_an_input_once_does_not_share_all() -> None:
    model, x, y = TwoUses(), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 10.0]])
    found = input_moments(find_tensors(model), [Call((x, y), {}), Call((x, y), {})])
    wanted = {"q": (4.0, 0.0), "k": (2.0, 200.0), "v": (0.0, 400.0)}
    assert {name: tuple(one.diagonal().tolist()) for name, one in found.items()} == {
        f"{name}.weight": one for name, one in wanted.items()
    }


def test_few_gradients_are_helped_by_the_moments_of_many_inputs() -> None:
    """Moments of few directions are singular: feedback from them trusts correlations that are not there."""
    true = correlated(1, 80, samples=4000)
    draw = torch.Generator().manual_seed(2)
    root = torch.linalg.cholesky(true[0] + 1e-3 * torch.eye(80))
    halves = [root @ torch.randn(80, 12, generator=draw) for _ in range(2)]
    seen, unseen = ((x @ x.T)[None] for x in halves)
    matrix = torch.randn((64, 80), generator=draw) * 0.1
    view, rows = View((64, 80), (0,)), torch.ones(64, dtype=torch.float64)
    alone = make_target(matrix, view, TensorStats(rows, seen + unseen, unseen))
    helped = make_target(matrix, view, TensorStats(rows, seen + unseen, unseen, inputs=true))
    assert alone.factored is not None
    assert helped.factored is not None
    assert not torch.equal(alone.factored.spill, helped.factored.spill)
