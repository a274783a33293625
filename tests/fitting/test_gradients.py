"""Which gradients count, and what they are taken through."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fitting.damage import damage, measured


def test_a_lone_call_is_judged_by_samples_that_made_no_factor() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(9, 6)
    found = measured(model, [x]).tensors["weight"]
    assert found.moments is not None
    assert found.unseen is not None
    # Of a linear model the moments are those of its inputs, up to a factor.
    for moments, rows in ((found.unseen, x[1::2]), (found.moments - found.unseen, x[0::2])):
        expected = rows.T @ rows
        ours = moments[0] / moments[0].trace() * expected.trace()
        assert torch.corrcoef(torch.stack([ours.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_a_single_sample_gives_no_feedback(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    assert measured(nn.Linear(6, 4), [torch.randn(1, 6)]).tensors["weight"].moments is None
    assert "needs two or more samples" in caplog.text


def test_a_gradient_that_is_not_finite_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    class Rooted(nn.Module):
        """The root of zero has a finite value and no finite gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out: Tensor = self.last(h / (h.square().sum(-1, keepdim=True).sqrt() + 1e-6))
            return out

    torch.manual_seed(0)
    x = torch.randn(8, 4)
    x[3] = 0
    found = measured(Rooted(), [x, torch.randn(8, 4)]).tensors
    assert all(bool(one.rows.isfinite().all()) for one in found.values())
    assert float(found["first.weight"].rows.sum()) > 0, "the other call counts"
    assert "first.weight: a gradient is not finite" in caplog.text


def test_a_buffer_that_the_forward_writes_keeps_the_gradients() -> None:
    class Remembering(nn.Linear):
        last: Tensor

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("last", torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.last.copy_(out)
            return out + self.last.mean()

    assert set(measured(Remembering(), [torch.randn(3, 4)]).tensors) == {"weight", "bias"}


@pytest.mark.parametrize("logits", [False, True])
def test_outputs_that_are_masked_do_not_count(logits: bool) -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            out = out.masked_fill(torch.arange(4) == 2, -torch.inf)
            return {"logits": out} if logits else out

    torch.manual_seed(0)
    model, x = Masked(6, 4), torch.randn(64, 6)
    found = measured(model, [x, x + 1]).tensors["weight"].rows
    assert bool(found.isfinite().all())
    assert found[2] == 0
    assert bool((found[[0, 1, 3]] > 0).all())
    noisy = copy.deepcopy(model)
    noisy.weight.data += 1e-3 * torch.randn(4, 6)
    predicted = float(found.sum()) * 1e-6
    assert predicted == pytest.approx(damage(model, noisy, [x, x + 1]), rel=0.7)


class Cut(nn.Module):
    """Cuts gradients off in all the ways that leave what is computed as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen, self.detached, self.rounded = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.unseen(x)
        z = self.rounded(x) * 8
        z = z + (z.round() - z).detach()
        return y + self.detached(x).detach() + z / 8


class Joined(Cut):
    """The same without cuts."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.unseen(x) + self.detached(x) + self.rounded(x)
        return y


@pytest.mark.slow
def test_gradients_are_taken_through_what_cuts_them_off() -> None:
    torch.manual_seed(0)
    cut, joined = Cut().eval(), Joined().eval()
    joined.load_state_dict(cut.state_dict())
    batches = [torch.randn(64, 8) for _ in range(4)]
    found, expected = measured(cut, batches), measured(joined, batches)
    for name, stats in expected.tensors.items():
        assert float(found.tensors[name].rows.sum()) == pytest.approx(float(stats.rows.sum()), rel=0.05), name
    assert torch.is_grad_enabled()


class Rewritten(nn.Module):
    """Writes into a weight where it switches gradients off."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.mul_(1.0)
        y: Tensor = self.a(x)
        return y


@pytest.mark.slow
def test_a_model_that_writes_where_gradients_are_off_is_measured_as_before() -> None:
    assert float(measured(Rewritten().eval(), [torch.randn(16, 8)]).tensors["a.weight"].rows.sum()) > 0
