"""A replica of the model that started this project: a dual-path RNN that another tool made twice as large.

It has 131.5 MB of random weights (PyTorch's default initialisation, mostly uniform: the hardest case for an
entropy coder), and its forward cannot be traced: a value decides which way it goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_CHANNELS, _INNER, _HIDDEN = 128, 384, 640
_INPUT = (1, 2, 40, 64)  # batch, real and imaginary part, time, frequency


class _Path(nn.Module):
    """A bidirectional LSTM along one axis, around which the input passes unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_CHANNELS)
        self.widen = nn.Linear(_CHANNELS, _INNER)
        self.lstm = nn.LSTM(_INNER, _HIDDEN, batch_first=True, bidirectional=True)
        self.narrow = nn.Linear(2 * _HIDDEN, _CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Input and output: float32 (batch, positions, channels)."""
        narrowed: Tensor = self.narrow(self.lstm(self.widen(self.norm(x)))[0])
        return x + narrowed


class DualPath(nn.Module):
    """Convolutions in, three times along time and along frequency, a transposed convolution out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(2, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, _CHANNELS, 3, stride=(2, 4), padding=1),
            nn.ReLU(),
        )
        self.along_time = nn.ModuleList(_Path() for _ in range(3))
        self.along_frequency = nn.ModuleList(_Path() for _ in range(3))
        self.decoder = nn.Sequential(
            nn.GroupNorm(8, _CHANNELS),
            nn.ReLU(),
            nn.ConvTranspose2d(_CHANNELS, 2, (4, 8), stride=(2, 4), padding=(1, 2)),
        )

    def forward(self, spectrum: Tensor) -> Tensor:
        """Input and output: float32 (batch, 2, time, frequency); time a multiple of 2, frequency of 4."""
        peak = float(spectrum.abs().max())
        if peak > 1:
            spectrum = spectrum / peak
        x = self.encoder(spectrum)
        for time, frequency in zip(self.along_time, self.along_frequency, strict=True):
            x = along(time, x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
            x = along(frequency, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = self.decoder(x)
        return output


def along(path: nn.Module, x: Tensor) -> Tensor:
    """Apply `path` along dimension 2 of (batch, other, positions, channels)."""
    output: Tensor = path(x.flatten(0, 1))
    return output.reshape(x.shape)


def load() -> nn.Module:
    """The model, always with the same random weights; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DualPath().eval()


def skeleton() -> nn.Module:
    """The architecture without data."""
    with torch.device("meta"):
        return DualPath().eval()


def spectrum(seed: int) -> Tensor:
    """A random input, float32 (1, 2, 40, 64); 0 is the seed that `snr` uses by default, and `calibration` does not."""
    return torch.randn(_INPUT, generator=torch.Generator().manual_seed(seed))


def calibration(samples: int = 4) -> list[Tensor]:
    """Random spectra (1, 2, 40, 64), none of which `snr` uses."""
    return [spectrum(seed) for seed in range(1, samples + 1)]


@torch.no_grad()
def snr(model: nn.Module, reference: nn.Module, seed: int = 0) -> float:
    """Energy of the reference's output for a random spectrum over the difference's, in dB; inf if there is none."""
    given = spectrum(seed)
    expected = reference(given).double()
    noise = float((model(given).double() - expected).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf
