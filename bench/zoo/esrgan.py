"""UpscalerJS's ESRGAN, which makes photos four times as large: the error that is added to FP32's own, per photo.

Weights: npm package @upscalerjs/esrgan-medium (MIT), a TensorFlow.js file of float32 numbers, rebuilt here from its own
list of layers. Photos: Debian package tuxpaint-stamps-default (GPL-2); it is shown them shrunk.

It was trained to please: damage that blurs its photos could bring them nearer to the originals. So the squared distance
to FP32's photos counts, as a share of that of FP32's to the originals: 0.01 is about 0.04 dB.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_TIMES = 4
_SIDE = 160  # pixels of what is cut from the middle of a photo
_MARGIN = 8  # pixels at the edges that are not judged
_PARTS = {"calibration": 40, "search": 100, "test": 100}
_BATCH = 10


class Generator(nn.Module):
    """Convolutions in residual dense blocks, and nearest-neighbour enlargement: whatever its list of layers says."""

    def __init__(self, layers: Sequence[Mapping[str, Any]], numbers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        self.convs = nn.ModuleDict()
        for layer in layers:
            if layer["class_name"] == "Conv2D":
                name = layer["config"]["name"]
                weight = numbers[f"{name}/kernel"].permute(3, 2, 0, 1)
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
                conv.load_state_dict({"weight": weight, "bias": numbers[f"{name}/bias"]})
                self.convs[name] = conv

    def forward(self, photos: Tensor) -> Tensor:
        """Float32 (photos, 3, 4 * side, 4 * side) from (photos, 3, side, side), both in 0..1."""
        made: dict[str, Tensor] = {}
        x = photos
        for layer in self.layers:
            config = layer["config"]
            inputs = [made[node[0]] for nodes in layer["inbound_nodes"] for node in nodes]
            x = self._apply(layer["class_name"], config, inputs) if inputs else photos
            made[config["name"]] = x
        return x

    def _apply(self, kind: str, config: Mapping[str, Any], inputs: list[Tensor]) -> Tensor:
        first = inputs[0]
        if kind == "Concatenate":
            return torch.cat(inputs, 1)
        if kind == "Add":
            return functools.reduce(torch.add, inputs)
        if kind == "UpSampling2D":
            return nn.functional.interpolate(first, scale_factor=float(config["size"][0]), mode=config["interpolation"])
        x = self.convs[config["name"]](first) if kind == "Conv2D" else first
        activations = {"linear": nn.Identity(), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid()}
        result: Tensor = activations[config["activation"]](x)
        return result


def load() -> nn.Module:
    """The pretrained model."""
    folder = data.FOLDER / "esrgan" / "models" / f"x{_TIMES}"
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    (manifest,) = described["weightsManifest"]
    raw = np.frombuffer(b"".join((folder / path).read_bytes() for path in manifest["paths"]), "<f4")
    numbers, start = {}, 0
    for weight in manifest["weights"]:
        end = start + int(np.prod(weight["shape"]))
        numbers[weight["name"]] = torch.from_numpy(raw[start:end].copy()).reshape(weight["shape"])
        start = end
    return Generator(described["modelTopology"]["model_config"]["config"]["layers"], numbers).eval()


@functools.cache
def _photos(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Small ones and the originals, float32 (photos, 3, 40, 40) and (photos, 3, 160, 160) in 0..255."""
    chosen = dict(zip(_PARTS, data.deal(data.photos(), list(_PARTS.values()), seed), strict=True))[part]
    originals = [_middle(data.square(file)) for file, _ in chosen]
    small = [photo.resize((_SIDE // _TIMES,) * 2, Image.Resampling.BICUBIC) for photo in originals]
    return _pixels(small), _pixels(originals)


def _middle(photo: Image.Image) -> Image.Image:
    """Its middle, of the photo as it is; smaller photos are enlarged."""
    if photo.width < _SIDE:
        return photo.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    corner = (photo.width - _SIDE) // 2
    return photo.crop((corner, corner, corner + _SIDE, corner + _SIDE))


def _pixels(photos: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(photo, np.float32) for photo in photos])).permute(0, 3, 1, 2)


def calibration(seed: int) -> list[Tensor]:
    return [batch / 255 for batch in _photos("calibration", seed)[0].split(_BATCH)]


@torch.no_grad()
def _enlarged(model: nn.Module, part: data.Part, seed: int) -> Tensor:
    return torch.cat([255 * model(batch / 255) for batch in _photos(part, seed)[0].split(_BATCH)]).clamp(0, 255)


@functools.cache
def _expected(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """FP32's photos, and the mean of their squared distances to the originals, float64 ()."""
    photos = _enlarged(load(), part, seed)
    return photos, _squares(photos, _photos(part, seed)[1]).mean()


def _squares(photos: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of each photo, float64 (photos,)."""
    return (photos - others)[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN].double().square().mean((1, 2, 3))


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    photos, own = _expected(part, seed)
    result: Scores = (_squares(_enlarged(model, part, seed), photos) / own).numpy()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    lost = _squares(_enlarged(model, "test", seed), _photos("test", seed)[1])
    return {"PSNR in dB": float((10 * torch.log10(255**2 / lost)).mean())}


PAIR = Pair(
    name="ESRGAN medium x4",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.01),
    widened=False,
    metrics=metrics,
    note="squared distance to FP32 / FP32's own to the originals, per photo",
)
