"""EfficientNet-Lite0 on 266 photos: mean divergence of its ImageNet probabilities from FP32's.

Photos: Debian package tuxpaint-stamps-default (GPL-2), in twelve categories. None is labelled for ImageNet, so the
metrics are agreement with FP32 and how often the five nearest photos tell the category.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from examples import effnet
from PIL import Image
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_SIDE = 224
_VIEWS = (1.0, 0.7)  # the whole photo and its middle: shares of the side
_NEIGHBOURS = 5


@functools.cache
def _photos() -> tuple[Tensor, Tensor]:
    """Views, uint8 (266, 2, 3, 224, 224), and categories, int64 (266,)."""
    files, categories = zip(*data.photos(), strict=True)
    return torch.stack([_views(data.square(file)) for file in files]), torch.tensor(categories)


def _views(square: Image.Image) -> Tensor:
    views = []
    for share in _VIEWS:
        margin = round(square.width * (1 - share) / 2)
        view = square.crop((margin, margin, square.width - margin, square.width - margin))
        views.append(np.asarray(view.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


def _half(part: data.Part, seed: int) -> list[int]:
    """Odd or even photos, by the seed; every fourth of the half that searches calibrates instead."""
    start = (seed + (part == "test")) % 2
    half = list(range(start, len(_photos()[0]), 2))
    if part == "test":
        return half
    return [photo for i, photo in enumerate(half) if (i % 4 == 0) == (part == "calibration")]


def _inputs(views: Tensor) -> Tensor:
    return (views.float() - 127) / 128  # the range that the Lite models were trained with


def calibration(seed: int) -> list[Tensor]:
    views = _photos()[0][_half("calibration", seed)].flatten(0, 1)
    return [_inputs(batch) for batch in torch.cat([views, views.flip(-1)]).split(16)]


@torch.no_grad()
def _log_probabilities(model: nn.Module, photos: Sequence[int]) -> Tensor:
    """Float64 (photos, views, classes)."""
    views = _photos()[0][photos]
    logits = [model(_inputs(batch)) for batch in views.flatten(0, 1).split(32)]
    result: Tensor = torch.cat(logits).double().log_softmax(1).unflatten(0, views.shape[:2])
    return result


def inputs(part: data.Part, seed: int) -> Tensor:
    """Whole photos, float32 (photos, 3, 224, 224)."""
    return _inputs(_photos()[0][_half(part, seed), 0])


def log_probabilities(model: nn.Module, part: data.Part, seed: int) -> Tensor:
    """Float64 (photos, views, classes)."""
    return _log_probabilities(model, _half(part, seed))


@functools.cache
def _expected(part: data.Part, seed: int) -> Tensor:
    return log_probabilities(effnet.load(), part, seed)


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """KL(FP32 || model) in nats, the mean over the views of each photo."""
    got = log_probabilities(model, part, seed)
    divergence = nn.functional.kl_div(got, _expected(part, seed), reduction="none", log_target=True)
    result: Scores = divergence.sum(-1).mean(1).numpy()
    return result


@torch.no_grad()
def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    got, expected = log_probabilities(model, "test", seed), _expected("test", seed)
    agreement = (got.argmax(-1) == expected.argmax(-1)).double().mean()
    return {"agreement with FP32": float(agreement), "5-NN accuracy": nearest(model)}


@torch.no_grad()
def nearest(model: nn.Module) -> float:
    """Share of the photos of which the category is told by the cosines of the five nearest others."""
    views, categories = _photos()
    seen: list[Tensor] = []
    handle = model.get_submodule("_fc").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in views[:, 0].split(32):
        model(_inputs(batch))
    handle.remove()
    features = nn.functional.normalize(torch.cat(seen).float(), dim=1)
    cosines, others = (features @ features.T).fill_diagonal_(-1).topk(_NEIGHBOURS)
    votes = torch.zeros(len(features), int(categories.max()) + 1).scatter_add_(1, categories[others], cosines)
    return float((votes.argmax(1) == categories).double().mean())


PAIR = Pair(
    name="EfficientNet-Lite0",
    load=effnet.load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.02),
    widened=False,
    metrics=metrics,
    note="KL to FP32 in nats, per photo",
)
