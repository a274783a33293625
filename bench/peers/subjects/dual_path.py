"""The dual-path RNN with random weights: four random spectra calibrate, another one judges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from examples import dual_path
from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Part, Subject, decibels, join_single, randomized

_UNSEEN = 0  # the seed of a spectrum that calibrates nothing


class _Branchless(nn.Module):
    """The same function without a branch that depends on a value, which no graph has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.along_time, self.along_frequency = model.along_time, model.along_frequency

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x / x.abs().max().clamp(min=1))  # type: ignore[operator]  # modules, which torch types loosely
        for time, frequency in zip(self.along_time, self.along_frequency, strict=True):  # type: ignore[arg-type]  # as above
            x = dual_path.along(time, x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
            x = dual_path.along(frequency, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = self.decoder(x)  # type: ignore[operator]
        return output


def _parts(model: nn.Module) -> Mapping[str, Part]:
    return {"model": Part(_Branchless(model), ("x",), ("y",), [(call,) for call in dual_path.calibration()], {})}


def _run(x: Tensor, model: nn.Module) -> Tensor:
    output: Tensor = model(x)
    return output


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    spectrum = dual_path.spectrum(_UNSEEN)
    return {"1 x 2 x 40 x 64": functools.partial(_run, spectrum)}


@torch.no_grad()
def watch(model: nn.Module) -> Tensor:
    output: Tensor = model(dual_path.spectrum(_UNSEEN)).float()
    return output


def judge(got: Tensor, expected: Tensor) -> Judgement:
    cosine = nn.functional.cosine_similarity(got.double().flatten(), expected.double().flatten(), dim=0)
    return Judgement(float(cosine), decibels(got, expected))


SUBJECT = Subject(
    title="dual-path RNN",
    load=dual_path.load,
    blank=lambda: randomized(dual_path.load()),
    calls=dual_path.calibration,
    parts=_parts,
    joined=join_single,
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="cosine to FP32",
    higher_is_better=True,
    fidelity="SQNR, dB",
)
