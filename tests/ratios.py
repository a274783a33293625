"""How near outputs are: the ratio of signal to noise."""

import torch
from torch import Tensor


def snr(exact: Tensor, other: Tensor) -> float:
    """In dB; more than 200 for the same."""
    exact, other = exact.detach().double(), other.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (exact - other).square().sum().clamp(min=1e-30)))
