"""The outputs of a model as tensors that can be compared, to measure damage.

Damage is the expected share of the output's energy that is lost: `|y' - y|^2 / |y|^2`, the mean over all floating
outputs of a call. Where a model returns `logits`, only they count, and an error counts by how it changes the
probabilities: twice the divergence KL(p || p'), which for small errors is the variance of the error under p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# By-products in an output: caches and traces that nobody scores.
_BY_PRODUCTS: Final = ("past_key_values", "hidden_states", "attentions", "cross_attentions", "mems", "cache_params")
_LOGITS: Final = "logits"


@dataclass(frozen=True, eq=False)
class Leaf:
    """One floating output of a call.

    Args:
        value: floating, of any shape.
        is_logits: the last dimension holds logarithms of unnormalized probabilities.
    """

    value: Tensor
    is_logits: bool = False

    def counts(self) -> Tensor:
        """Which numbers count, and of logits which distributions: the finite ones (a boolean tensor)."""
        value = self.value.detach()
        if not self.is_logits:
            return value.isfinite()
        broken = value.isnan() | (value == torch.inf)
        return value.isfinite().any(-1) & ~broken.any(-1)

    def energy(self) -> float:
        """What damage is relative to: the sum of squares, or the number of distributions if these are logits."""
        if self.is_logits:
            return float(self.counts().sum())
        return float(self.value.detach()[self.counts()].double().square().sum())

    def error(self, other: Tensor) -> float:
        """The error of another value of this output against this one, in the unit of `energy`."""
        counts = self.counts()
        ours, theirs = (tensor.detach()[counts].double() for tensor in (self.value, other))
        if self.is_logits:
            expected, got = ours.log_softmax(-1), theirs.log_softmax(-1)
            lost = 2 * float((expected.exp() * (expected - got))[expected.isfinite()].sum())
        else:
            lost = float((theirs - ours).square().sum())
        return lost if math.isfinite(lost) else math.inf

    def probe(self, generator: torch.Generator) -> Tensor:
        """A random direction r of the output's shape with `E[(r . e)^2] = error(value + e)` for small errors e."""
        value = self.value.detach()
        if self.is_logits:  # the score function of a sampled class: its covariance is the Fisher information
            flat = torch.where(self.counts()[..., None], value, torch.zeros_like(value)).float()
            probabilities = flat.softmax(-1).reshape(-1, value.shape[-1])
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            scores = probabilities.neg().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probabilities.dtype))
            # A random sign for each distribution keeps sums over distributions free of cross terms.
            signed = (scores * _signs((len(scores), 1), generator)).reshape(value.shape)
            return (signed * self.counts()[..., None]).to(value.dtype)
        return (_signs(value.shape, generator) * self.counts()).to(value.dtype)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1).float()


def leaves_of(output: Any) -> list[Leaf]:
    """The floating tensors in what a model returned.

    >>> [leaf.is_logits for leaf in leaves_of({"logits": torch.zeros(2, 3), "past_key_values": torch.zeros(4)})]
    [True]
    >>> len(leaves_of((torch.zeros(2), torch.tensor([1]))))
    1
    """
    if isinstance(output, Mapping):
        logits = output.get(_LOGITS)
        if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1 and logits.shape[-1] > 1:
            return [Leaf(logits, is_logits=True)]
        output = {key: value for key, value in output.items() if key not in _BY_PRODUCTS}
    return [Leaf(tensor) for tensor in tensors_of(output)]


def tensors_of(value: Any) -> list[Tensor]:
    """The floating tensors, except empty ones, in the arguments or the output of a module.

    >>> [tuple(found.shape) for found in tensors_of({"a": (torch.zeros(2), None), "b": torch.tensor([1])})]
    [(2,)]
    """
    tensors = [leaf for leaf in tree_leaves(_plain(value)) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def _plain(output: Any) -> Any:
    """The same with dicts and lists for mappings and sequences of classes that torch's trees do not know."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [_plain(value) for value in output]
    return output
