import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pared.formats.views import View, view_of


@st.composite
def views(draw: st.DrawFn) -> View:
    split = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    rows = draw(st.sets(st.integers(0, len(split) - 1)))
    return View(split, tuple(sorted(rows)))


@settings(deadline=None)
@given(views())
def test_matrix_and_back_is_the_identity(view: View) -> None:
    tensor = torch.arange(torch.tensor(view.split).prod().item()).reshape(view.split)
    matrix = view.matrix(tensor)
    assert matrix.shape[0] == view.n_rows
    assert torch.equal(view.restore(matrix, tuple(tensor.shape)), tensor)


@settings(deadline=None)
@given(views())
def test_spread_agrees_with_the_matrix(view: View) -> None:
    per_row = torch.arange(1, view.n_rows + 1).float()
    ones = torch.ones(view.split) * view.spread(per_row.reshape(view.row_sizes))
    assert torch.equal(view.matrix(ones), per_row[:, None].expand(view.n_rows, ones.numel() // view.n_rows))


def conv_transpose_channels(module: nn.Module) -> torch.Tensor:
    """The output channel that each weight feeds, found by running the layer on one weight at a time."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    found = torch.empty(weight.numel(), dtype=torch.long)
    with torch.no_grad():
        for i in range(weight.numel()):
            weight.zero_()
            weight.view(-1)[i] = 1.0
            out = module(torch.ones(1, weight.shape[0], *[3] * (weight.dim() - 2)))
            channel = out.abs().sum(dim=tuple(range(2, out.dim()))).argmax()
            found[i] = channel
    return found.reshape(weight.shape)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_rows_of_transposed_convolutions_are_output_channels(cls: type[nn.Module], groups: int) -> None:
    module = cls(4, 6, 2, groups=groups, bias=False)
    channels = conv_transpose_channels(module)
    view = view_of(module, "weight", tuple(channels.shape))
    matrix = view.matrix(channels)
    assert matrix.shape[0] == 6
    assert torch.equal(matrix, torch.arange(6)[:, None].expand_as(matrix))


def test_the_second_dimension_is_rows_in_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(5, 7)  # type: ignore[no-untyped-call]  # transformers'
    assert view_of(layer, "weight", (7, 5)).row_sizes == (5,)


def test_short_rows_share_one_step() -> None:
    attention = nn.Linear(1, 64)
    assert view_of(attention, "weight", (64, 1)) == View((64, 1), ())
    assert view_of(nn.Conv2d(8, 8, 3, groups=8), "weight", (8, 1, 3, 3)).n_rows == 8
