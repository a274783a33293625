"""Silero VAD, which tells speech from noise, on prompts in noise: divergence of its answers from FP32's, per clip.

Weights: package silero-vad (MIT), of its network for 16 kHz. Recordings: Debian package asterisk-core-sounds-en-wav
(CC-BY-SA), one speaker. Each is put into noise at a place that the seed draws, so that it is known where speech is.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from examples import package_folder
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_RATE, _FRAME, _CONTEXT = 16_000, 512, 64
_BANDS, _WINDOW = 129, 256  # of the spectrum
_HIDDEN = 128
_FRAMES = 125  # of a clip: 4 seconds
_SHORTEST, _LONGEST = 0.7, 3.5  # seconds of a recording
_CLIPS = {"calibration": 40, "search": 160, "test": 160}
_NUMBERS = {"calibration": 0, "search": 1, "test": 2}  # of the parts, as seeds
_BATCH, _CALIBRATION_BATCH = 40, 8
_SIGNAL_TO_NOISE = (0, 15)  # dB
_LOWEST = 50  # Hz: the noise has nothing below
_SMOOTHED, _LOUD = 480, 1e-3  # samples; the share of the greatest power that is taken for speech


class Vad(nn.Module):
    """A spectrum, four convolutions, an LSTM over frames; the names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * _BANDS, _WINDOW, _WINDOW // 2, bias=False)
        self.conv1 = nn.Conv1d(_BANDS, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, _HIDDEN, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(_HIDDEN, _HIDDEN)
        self.final_conv = nn.Conv1d(_HIDDEN, 1, 1)

    def forward(self, waves: Tensor) -> Tensor:
        """Logits of speech, float32 (clips, frames), from samples (clips, 512 * frames) that follow a silence."""
        frames = nn.functional.pad(waves, (_CONTEXT, 0)).unfold(1, _CONTEXT + _FRAME, _FRAME)
        heard = self._features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        hidden: list[Tensor] = []
        state: tuple[Tensor, Tensor] | None = None
        for features in heard.unbind(1):
            state = self.lstm_cell(features, state)
            hidden.append(state[0])
        logits: Tensor = self.final_conv(torch.stack(hidden, 2).relu()).squeeze(1)
        return logits

    def _features(self, frames: Tensor) -> Tensor:
        """Float32 (frames, 128) from samples (frames, 576)."""
        waves = self.stft_conv(nn.functional.pad(frames, (0, _CONTEXT), "reflect")[:, None])
        x = waves.unflatten(1, (2, _BANDS)).square().sum(1).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        features: Tensor = x.squeeze(-1)
        return features


def load() -> nn.Module:
    """The pretrained model."""
    model = Vad()
    model.load_state_dict(load_file(package_folder("silero_vad") / "data" / "silero_vad_16k.safetensors"))
    return model.eval()


@functools.cache
def _files() -> list[Path]:
    """The prompts of a fitting length, without those that are no speech."""
    folder = data.DEBIAN / "asterisk" / "sounds" / "en_US_f_Allison"
    files = sorted(folder.rglob("*.wav"))
    speech = [file for file in files if "beep" not in file.name and file.parent.name != "silence"]
    return [file for file in speech if _SHORTEST <= len(data.recording(file, _RATE)) / _RATE <= _LONGEST]


def _noise(random: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """Of deviation 1 and a random colour: white, brown or between."""
    pitches = np.fft.rfftfreq(samples, 1 / _RATE)
    shape = np.where(pitches < _LOWEST, 0.0, np.maximum(pitches, _LOWEST) ** -random.uniform(0, 1))
    noise = np.fft.irfft(np.fft.rfft(random.standard_normal(samples)) * shape, samples)
    result: NDArray[np.float64] = noise / noise.std()
    return result


def clip(random: np.random.Generator, speech: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Samples, float32 (64000,), of speech somewhere in noise, and which frames are speech, bool (125,)."""
    samples = _FRAMES * _FRAME
    start = int(random.integers(samples - len(speech) + 1))
    power = np.convolve(speech**2, np.ones(_SMOOTHED) / _SMOOTHED, "same")
    sound, spoken = np.zeros(samples), np.zeros(samples)
    sound[start : start + len(speech)] = speech
    spoken[start : start + len(speech)] = power > _LOUD * power.max()
    decibels = random.uniform(*_SIGNAL_TO_NOISE)
    sound += _noise(random, samples) * speech.std() * 10 ** (-decibels / 20)
    return torch.from_numpy(sound).float(), torch.from_numpy(spoken.reshape(_FRAMES, _FRAME).mean(1) > 0.5)


@functools.cache
def _clips(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Samples, float32 (clips, 64000), and which frames are speech, bool (clips, 125)."""
    files = dict(zip(_CLIPS, data.deal(_files(), list(_CLIPS.values()), seed), strict=True))[part]
    randoms = [data.generator(seed, _NUMBERS[part], i) for i in range(len(files))]
    drawn = [clip(random, data.recording(file, _RATE)) for random, file in zip(randoms, files, strict=True)]
    return torch.stack([sound for sound, _ in drawn]), torch.stack([spoken for _, spoken in drawn])


def calibration(seed: int) -> list[Tensor]:
    return list(_clips("calibration", seed)[0].split(_CALIBRATION_BATCH))


@torch.no_grad()
def _logits(model: nn.Module, part: data.Part, seed: int) -> Tensor:
    """Float64 (clips, frames)."""
    return torch.cat([model(batch) for batch in _clips(part, seed)[0].split(_BATCH)]).double()


@functools.cache
def _expected(part: data.Part, seed: int) -> Tensor:
    return _logits(load(), part, seed)


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """KL(FP32 || model) in nats, the mean over the frames of each clip."""
    got, expected = _logits(model, part, seed), _expected(part, seed)
    log = nn.functional.logsigmoid
    speech = expected.sigmoid() * (log(expected) - log(got))
    silence = (-expected).sigmoid() * (log(-expected) - log(-got))
    result: Scores = (speech + silence).mean(1).numpy()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    got, expected, spoken = _logits(model, "test", seed), _expected("test", seed), _clips("test", seed)[1]
    agreement = ((got > 0) == (expected > 0)).double().mean()
    return {"agreement with FP32": float(agreement), "area under ROC": _area(got[spoken], got[~spoken])}


def _area(speech: Tensor, silence: Tensor) -> float:
    """How often a frame of speech has the greater logit of the two."""
    return float(torch.searchsorted(silence.sort().values, speech).double().mean() / len(silence))


PAIR = Pair(
    name="Silero VAD",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.01),
    widened=False,
    metrics=metrics,
    note="KL to FP32 in nats per frame, per clip of 4 s",
)
