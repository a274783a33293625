"""Every product of a watched weight is seen, whoever asks for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.fitting.calibration.watch import Product, ProductWatch


def seen(model: nn.Module, *inputs: Tensor, gradients: bool = False) -> tuple[list[Product], Tensor]:
    found: list[Product] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with ProductWatch(names, found.append, gradients=gradients):
        out = model(*inputs)
    return found, out


class Odd(nn.Module):
    """Functional and tied uses, and a subclass that pads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.addmm(torch.zeros(4), self.table(ids), self.mix)
        return F.linear(h, self.table.weight)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Linear(3, 5), (2, 3), "linear"),
        (nn.Conv1d(2, 3, 3), (1, 2, 8), "conv"),
        (nn.Conv2d(2, 4, 3, groups=2), (1, 2, 8, 8), "conv"),
        (nn.Conv3d(1, 2, 2), (1, 1, 4, 4, 4), "conv"),
        (nn.ConvTranspose2d(2, 3, 2), (1, 2, 4, 4), "conv"),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(shape)
    found, out = seen(layer, x)
    assert [(p.tensor, p.kind) for p in found] == [("weight", kind)]
    assert found[0].x is x
    assert torch.equal(found[0].y, out)


def test_functional_and_tied_uses() -> None:
    found, _ = seen(Odd(), torch.tensor([1, 2, 3]))
    assert [(p.tensor, p.kind) for p in found] == [
        ("table.weight", "embedding"),
        ("mix", "linear"),
        ("table.weight", "linear"),
    ]


def test_each_product_has_an_input_of_its_own() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + 2 * self.other(x)

    torch.manual_seed(0)
    model = Shared()
    found, out = seen(model, torch.randn(4, 3), gradients=True)
    grads = torch.autograd.grad(out.sum(), [p.x for p in found])
    assert torch.allclose(grads[0], model.one.weight.sum(0).expand(4, 3))
    assert torch.allclose(grads[1], 2 * model.other.weight.sum(0).expand(4, 3))


def test_watching_changes_no_output() -> None:
    torch.manual_seed(0)
    model = Odd()
    ids = torch.tensor([4, 5])
    assert torch.equal(seen(model, ids)[1], model(ids))
    assert torch.equal(seen(model, ids, gradients=True)[1], model(ids))


def test_weights_of_others_are_not_told_of() -> None:
    found: list[Product] = []
    with ProductWatch({}, found.append):
        nn.Linear(2, 2)(torch.zeros(1, 2))
    assert found == []


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(1, 8, (5, 1), (2, 1), (3, 0)), (4, 1, 20, 1)),
        (nn.Conv2d(3, 12, 3, 2, 1, dilation=2), (2, 3, 11, 9)),
        (nn.Conv2d(3, 8, 3, padding="same"), (2, 3, 11, 9)),
        (nn.Conv2d(2, 8, 3, groups=2), (2, 2, 7, 7)),
    ],
)
def test_gradients_by_an_input_of_few_channels_are_those_of_torch(layer: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    found, out = seen(layer, x.detach(), gradients=True)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad(out, (found[0].x, *layer.parameters()), direction)
    theirs = torch.autograd.grad(layer(x), (x, *layer.parameters()), direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
