"""The rows of a stack of matrices are the output channels of the products that it is seen in."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.fitting.calibration.orientation import oriented
from pared.model.calls import Call
from pared.model.tensors import ModelTensor, find_tensors

Product = Callable[[Tensor, Tensor], Tensor]
EXPERTS = torch.tensor([0, 1, 2, 3, 3, 1])


class Using(nn.Module):
    """Computes something from a weight."""

    def __init__(self, shape: tuple[int, ...], product: Product) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w)


def seen(model: nn.Module, *inputs: Tensor) -> ModelTensor:
    return next(iter(oriented(find_tensors(model), [Call(inputs, {})])))


FLAT, STACKED = torch.randn(6, 32), torch.randn(4, 6, 32)


@pytest.mark.parametrize(
    ("shape", "x", "product", "rows", "groups"),
    [
        ((4, 48, 32), FLAT, lambda x, w: sum(F.linear(x, w[e]) for e in range(4)), (0, 1), 4),
        ((4, 32, 48), FLAT, lambda x, w: sum(x @ w[e] for e in range(4)), (0, 2), 4),
        ((4, 32, 96), FLAT, lambda x, w: sum(x @ w[e, :, c : c + 48] for e in range(4) for c in (0, 48)), (0, 2), 4),
        ((4, 32, 48), STACKED, lambda x, w: torch.bmm(x, w), (0, 2), 4),
        ((4, 48, 32), STACKED, lambda x, w: torch.bmm(x, w.transpose(1, 2)), (0, 1), 4),
        ((4, 32, 48), STACKED, lambda x, w: torch.baddbmm(torch.zeros(4, 1, 48), x, w), (0, 2), 4),
        ((4, 32, 48), FLAT, lambda x, w: x @ w, (0, 2), 4),
        ((4, 32, 48), FLAT, lambda x, w: torch.einsum("bi,eio->beo", x, w), (0, 2), 1),  # all have the same inputs
        ((4, 48, 32), FLAT, lambda x, w: torch.einsum("bi,eoi->beo", x, w), (0, 1), 1),
        ((32, 4, 8), FLAT, lambda x, w: torch.einsum("bd,dhk->bhk", x, w), (1, 2), 1),  # heads of attention
        ((4, 8, 32), FLAT, lambda x, w: torch.einsum("bhk,hkd->bd", x.reshape(6, 4, 8), w), (2,), 1),
        ((4, 32, 48), FLAT, lambda x, w: torch.bmm(x[:, None], w[EXPERTS]), (0, 2), 4),  # a matrix for each token
        ((4, 48, 32), FLAT, lambda x, w: torch.einsum("bi,boi->bo", x, w[EXPERTS]), (0, 1), 4),
        ((4, 48, 32), FLAT, lambda x, w: torch.bmm(w.index_select(0, EXPERTS), x[..., None]), (0, 1), 4),
        ((4, 48, 32), STACKED, lambda x, w: torch.bmm(x, (w * 0.5).transpose(1, 2)), (0, 1), 4),
        ((32, 48, 4), STACKED, lambda x, w: torch.bmm(x, w.permute(2, 0, 1).contiguous()), (1, 2), 1),
        ((2, 3, 32, 32), FLAT, lambda x, w: sum(x @ w[a, b] for a in range(2) for b in range(3)), (0, 1, 3), 6),
        ((4, 32, 48), STACKED, lambda x, w: torch.vmap(lambda a, b: a @ b)(x, w), (0, 2), 4),
        ((8, 32, 3), STACKED.transpose(1, 2), lambda x, w: F.conv1d(x, w), (0,), 1),
        ((32, 8, 3), STACKED.transpose(1, 2), lambda x, w: F.conv_transpose1d(x, w), (1,), 1),
    ],
)
def test_rows_are_what_the_product_does_not_sum_over(
    shape: tuple[int, ...], x: Tensor, product: Product, rows: tuple[int, ...], groups: int
) -> None:
    found = seen(Using(shape, product), x)
    assert (found.view.rows, found.groups) == (rows, groups)


@pytest.mark.parametrize(
    ("shape", "product"),
    [
        ((1, 6, 32), lambda x, w: F.linear(x + w, torch.ones(3, 32))),  # positions
        ((1, 6, 32), lambda x, w: F.linear(x * w, torch.ones(3, 32))),  # scales
        ((8, 6, 32), lambda x, w: (x * w).sum(-1)),
        ((8, 6, 32), lambda x, w: x + 1),  # not used
    ],
)
def test_what_no_product_sums_over_keeps_its_rows(shape: tuple[int, ...], product: Product) -> None:
    found = seen(Using(shape, product), FLAT)
    assert (found.view.rows, found.groups) == ((0,), None)


def test_tokens_that_a_layer_gets_are_no_weights() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 6, 32))
            self.layer = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(self.w)

    assert seen(Tokens(), torch.randn(6, 16)).view.rows == (0,)


def test_layers_of_torch_keep_their_rows() -> None:
    model = nn.Sequential(
        nn.Conv1d(32, 8, 3), nn.ConvTranspose1d(8, 6, 3), nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 4, 3))
    )
    before = find_tensors(model)
    assert oriented(before, [Call((torch.randn(2, 32, 9),), {})]) is before


def test_half_precision_and_a_layer_that_computes_in_another_type() -> None:
    found = seen(Using((4, 48, 32), lambda x, w: torch.bmm(x, w.float().transpose(1, 2))).bfloat16(), STACKED)
    assert (found.view.rows, found.groups) == ((0, 1), 4)
