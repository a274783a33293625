"""How near outputs are: the ratio of signal to noise."""

import torch
from torch import Tensor


def snr(exact: Tensor, other: Tensor) -> float:
    """In dB; infinite for the same."""
    exact, other = exact.detach().double(), other.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (exact - other).square().sum()))
