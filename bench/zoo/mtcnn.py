"""MTCNN, three networks that find faces, on faces and photos: divergence of what they say from FP32's, per image.

Weights: package facenet-pytorch (MIT). Faces: 100 crops of faces and 100 of other things, 25 x 25 and grey, in package
scikit-image (BSD), tinted here; photos in colour, with hardly a face: Debian package tuxpaint-stamps-default (GPL-2).
Each image is seen through several windows, each window by all three networks, as if none before had thrown it out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from examples import package_folder
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_SIDES = {"pnet": 12, "rnet": 24, "onet": 48}  # of what each network sees
_LARGEST = 48
_PLACES = (4, 4, 14)  # numbers that each network says of where a face is: a box, and eyes, nose and mouth
_CROPS, _FACES = 200, 100  # the first crops are the faces
_IMAGES = {"calibration": 40, "search": 80, "test": 80}  # crops, and as many photos
_NUMBERS = {"calibration": 0, "search": 1, "test": 2}  # of the parts, as seeds
_WINDOWS = 4  # of each image
_LEAST_OF_CROP, _LEAST_OF_PHOTO = 0.8, 0.3  # shares of the side that a window has
_TINTS = (0.6, 1.1)
_BATCH = 64
_DEVIATION = 0.1  # sides of a window: that of a place, if what a network says is taken for the middle of a Gaussian


class Stage(nn.Module):
    """Convolutions with PReLU and pooling, a hidden layer, and linear outputs; the names are those of the files.

    Args:
        convs: channels, kernel size and pooling window (0: no pooling) of each.
        hidden: inputs and outputs of the hidden layer; without it the outputs are convolutions too.
        outputs: widths of the outputs: face or not, the box, and (in the last stage) five places in the face.
    """

    def __init__(
        self, convs: Sequence[tuple[int, int, int]], hidden: tuple[int, int] | None, outputs: Sequence[int]
    ) -> None:
        super().__init__()
        channels = [3, *(width for width, _, _ in convs)]
        self.convs = len(convs)
        for i, ((ins, outs), (_, kernel, pool)) in enumerate(zip(itertools.pairwise(channels), convs, strict=True), 1):
            self.add_module(f"conv{i}", nn.Conv2d(ins, outs, kernel))
            self.add_module(f"prelu{i}", nn.PReLU(outs))
            self.add_module(f"pool{i}", nn.MaxPool2d(pool, 2, ceil_mode=True) if pool else nn.Identity())
        self.hidden = f"dense{len(convs) + 1}" if hidden else ""
        if hidden:
            self.add_module(self.hidden, nn.Linear(*hidden))
            self.add_module(f"prelu{len(convs) + 1}", nn.PReLU(hidden[1]))
        kind = f"dense{len(convs) + 2}" if hidden else f"conv{len(convs) + 1}"
        self.outputs = [f"{kind}_{i}" for i in range(1, len(outputs) + 1)]
        for name, width in zip(self.outputs, outputs, strict=True):
            self.add_module(name, nn.Linear(hidden[1], width) if hidden else nn.Conv2d(channels[-1], width, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Of each output (windows, width), from pixels (windows, 3, side, side) in -1..1."""
        for i in range(1, self.convs + 1):
            for kind in ("conv", "prelu", "pool"):
                x = self.get_submodule(f"{kind}{i}")(x)
        if self.hidden:
            x = x.permute(0, 3, 2, 1).flatten(1)
            x = self.get_submodule(f"prelu{self.convs + 1}")(self.get_submodule(self.hidden)(x))
        return [self.get_submodule(name)(x).flatten(1) for name in self.outputs]


class Cascade(nn.Module):
    """The three networks, all of which see every window."""

    def __init__(self) -> None:
        super().__init__()
        self.pnet = Stage([(10, 3, 2), (16, 3, 0), (32, 3, 0)], None, (2, 4))
        self.rnet = Stage([(28, 3, 3), (48, 3, 3), (64, 2, 0)], (576, 128), (2, 4))
        self.onet = Stage([(32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)], (1152, 256), (2, 4, 10))

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (windows, 3, 2), and places (windows, 18) in sides of a window, from pixels (windows, 3, 48, 48)."""
        said = []
        for name, side in _SIDES.items():
            said.append(self.get_submodule(name)(nn.functional.interpolate(windows, (side, side), mode="area")))
        return torch.stack([logits for logits, *_ in said], 1), torch.cat([p for _, *places in said for p in places], 1)


def load() -> nn.Module:
    """The pretrained model."""
    model = Cascade()
    for name in _SIDES:
        file = package_folder("facenet_pytorch") / "data" / f"{name}.pt"
        model.get_submodule(name).load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@functools.cache
def _crops() -> list[Image.Image]:
    """Grey, 25 x 25: the faces first."""
    crops = np.load(package_folder("skimage") / "data" / "lfw_subset.npy")
    return [Image.fromarray((255 * crop).astype(np.uint8)).convert("RGB") for crop in crops]


def _photos(part: data.Part, seed: int) -> list[Image.Image]:
    chosen = dict(zip(_IMAGES, data.deal(data.photos(), list(_IMAGES.values()), seed), strict=True))[part]
    return [data.square(file) for file, _ in chosen]


def _windows(image: Image.Image, random: np.random.Generator, least: float, tint: NDArray[np.float64]) -> Tensor:
    """Float32 (windows, 3, 48, 48), from anywhere in a square image, of at least this share of its side."""
    windows = []
    for _ in range(_WINDOWS):
        side = image.width * random.uniform(least, 1)
        left, top = random.uniform(0, image.width - side, 2)
        size, box = (_LARGEST, _LARGEST), (left, top, left + side, top + side)
        windows.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR, box), np.float32))
    pixels = (np.stack(windows) * tint).clip(0, 255)
    return torch.from_numpy((pixels - 127.5) / 128).permute(0, 3, 1, 2).float()  # the range it was trained with


@functools.cache
def _images(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Windows, float32 (images, windows, 3, 48, 48): crops, then photos; and which of the crops are faces, bool."""
    random = data.generator(seed, _NUMBERS[part])
    crops = dict(zip(_IMAGES, data.deal(range(_CROPS), list(_IMAGES.values()), seed), strict=True))[part]
    windows = [_windows(_crops()[i], random, _LEAST_OF_CROP, random.uniform(*_TINTS, 3)) for i in crops]
    windows += [_windows(photo, random, _LEAST_OF_PHOTO, np.ones(3)) for photo in _photos(part, seed)]
    return torch.stack(windows), torch.tensor(crops) < _FACES


def calibration(seed: int) -> list[Tensor]:
    windows = _images("calibration", seed)[0].flatten(0, 1)
    order = data.generator(seed).permutation(len(windows))  # so that each batch has both kinds
    return list(windows[order].split(_BATCH))


@torch.no_grad()
def _said(model: nn.Module, part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Log probabilities, float64 (images, windows, 3, 2), and places, float64 (images, windows, 18)."""
    windows = _images(part, seed)[0]
    said = [model(batch) for batch in windows.flatten(0, 1).split(_BATCH)]
    logits, places = (torch.cat(parts).double().unflatten(0, windows.shape[:2]) for parts in zip(*said, strict=True))
    return logits.log_softmax(-1), places


@functools.cache
def _expected(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    return _said(load(), part, seed)


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """KL(FP32 || model) in nats, the mean over windows: of face or not, and, as likely as it is a face, of its places.

    Each is the mean over all networks, so that none can be spared; the places count as Gaussians of one deviation.
    """
    (got, places), (expected, expected_places) = _said(model, part, seed), _expected(part, seed)
    faces = nn.functional.kl_div(got, expected, reduction="none", log_target=True).sum(-1).mean(-1)
    likely = expected[..., 1].exp().repeat_interleave(torch.tensor(_PLACES), -1)
    moved = (likely * (places - expected_places).square()).mean(-1) / (2 * _DEVIATION**2)
    result: Scores = (faces + moved).mean(1).numpy()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    (got, _), (expected, _), known = _said(model, "test", seed), _expected("test", seed), _images("test", seed)[1]
    found, found_before = got.argmax(-1), expected.argmax(-1)
    right = found[: len(known), :, -1] == known[:, None]
    return {
        "agreement with FP32": float((found == found_before).double().mean()),
        "accuracy of the last network on crops": float(right.double().mean()),
    }


PAIR = Pair(
    name="MTCNN",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.02),
    widened=False,
    metrics=metrics,
    note="KL to FP32 in nats, of faces and of their places, per image",
)
