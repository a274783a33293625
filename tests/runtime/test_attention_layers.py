"""Counterparts of attention take the hints and masks that PyTorch takes, and its fast paths are left and rejoined."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pared.runtime.layers.attention import leave_fast_paths, rejoin_fast_paths
from pared.runtime.layers.counterpart import stand_in
from tests.runtime.counterparts import counterpart_of, quantize, tensors


@pytest.mark.parametrize("make", [lambda: nn.LSTM(16, 16, 2, dropout=0.5), lambda: nn.MultiheadAttention(16, 2, 0.5)])
def test_dropout_in_training_is_the_layers_own(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().requires_grad_(False).train()
    counterpart = counterpart_of(layer, "dynamic")
    x = torch.randn(5, 2, 16)
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with torch.no_grad():
        one, other = (tensors(counterpart(*args))[0] for _ in range(2))
        assert not torch.equal(one, other)


def test_a_causal_hint_without_a_mask_is_an_error_as_in_pytorch() -> None:
    counterpart = counterpart_of(nn.MultiheadAttention(16, 2).eval().requires_grad_(False), "dynamic")
    x = torch.randn(5, 2, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask"):
        counterpart(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.int64)},
        {"attn_mask": torch.zeros(1, 5)},
        {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
    ],
)
def test_masks_that_pytorch_refuses_are_refused(kwargs: dict[str, Tensor]) -> None:
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    counterpart, x = counterpart_of(layer, "dynamic"), torch.randn(2, 5, 16)
    for one in (layer, counterpart):
        with pytest.raises((AssertionError, RuntimeError)):
            one(x, x, x, **kwargs)


def test_an_encoder_gets_its_fast_path_back() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    model = nn.TransformerEncoder(layer, 1).eval()
    attention = model.layers[0].self_attn
    stand_in(attention, {"in_proj_weight": quantize(attention, "in_proj_weight")}, None)
    leave_fast_paths(model)
    leave_fast_paths(model)  # once more changes nothing
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (False, 0)
    rejoin_fast_paths(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (True, 1)
