"""The outputs of a model as tensors that can be compared, to measure damage.

Damage is the expected share of the output's energy that is lost: `|y' - y|^2 / |y|^2`, the mean over all floating
outputs of a call. An output that is known to hold logits loses that share and, in addition, what an error changes in
the probabilities: twice the divergence KL(p || p'), which for small errors is the variance of the error under p.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# What a model of transformers returns beside its results, to look into it or for its own next call. Nobody scores it.
_BY_PRODUCTS: Final = ("past_key_values", "hidden_states", "attentions", "cross_attentions", "mems", "cache_params")
_AT_ONCE: Final = 1 << 22  # numbers that are looked at at once in float64
# Beyond this, a number stands for minus infinity: masks are filled with the least number of their type.
_INFINITE: Final = torch.finfo(torch.float32).max / 2


class _Every(Container[str]):
    """Contains all paths."""

    def __contains__(self, _path: object) -> bool:
        return True


EVERY: Final = _Every()

Key = tuple[str, bool, str]  # the path of an output, whether it counts as logits, and for which task it was asked


@dataclass(frozen=True, eq=False)
class Leaf:
    """One floating output of a call.

    Args:
        value: floating, of any shape.
        is_logits: the last dimension holds logarithms of unnormalized probabilities, and these are what counts.
        path: where it is in what the model returned: keys and positions, joined by dots.
        task: that of the call (`Call.task`): outputs for other tasks may be far smaller, and count as much.
    """

    value: Tensor
    is_logits: bool = False
    path: str = "output"
    task: str = ""

    @property
    def key(self) -> Key:
        """What tells it from the other leaves of a call, and from those of calls for other tasks."""
        return self.path, self.is_logits, self.task

    def counts(self) -> Tensor:
        """Which numbers count, and of logits which distributions: the finite ones (a boolean tensor)."""
        value = self.value.detach()
        if not self.is_logits:
            return value.abs() < min(_INFINITE, torch.finfo(value.dtype).max / 2)  # false for NaN
        broken = value.isnan() | (value == torch.inf)
        return value.isfinite().any(-1) & ~broken.any(-1)

    def energy(self) -> float:
        """What damage is relative to: the sum of squares, or the number of distributions if these are logits."""
        if self.is_logits:
            return float(self.counts().sum())
        pieces = zip(*(one.reshape(-1).split(_AT_ONCE) for one in (self.value.detach(), self.counts())), strict=True)
        return sum((float(piece[counts].double().square().sum()) for piece, counts in pieces), 0.0)

    def error(self, other: Tensor) -> float:
        """The error of another value of this output against this one, in the unit of `energy`."""
        shape = (-1, self.value.shape[-1]) if self.is_logits else (-1,)
        # In pieces: in float64, the logits of a few windows would take gigabytes.
        at_once = max(1, _AT_ONCE // shape[-1]) if self.is_logits else _AT_ONCE
        ours, theirs = (tensor.detach().reshape(shape).split(at_once) for tensor in (self.value, other))
        counted = self.counts().reshape(-1).split(at_once)
        lost = sum(map(self._lost, ours, theirs, counted))
        return lost if math.isfinite(lost) else math.inf

    def _lost(self, ours: Tensor, theirs: Tensor, counts: Tensor) -> float:
        """The error of some numbers, or of the rows of some distributions."""
        ours, theirs = ours[counts].double(), theirs[counts].double()
        if not self.is_logits:
            return float((theirs - ours).square().sum())
        expected, got = ours.log_softmax(-1), theirs.log_softmax(-1)
        return 2 * float((expected.exp() * (expected - got))[expected.isfinite()].sum())

    def add_probe(self, total: Tensor, scale: float, generator: torch.Generator) -> None:
        """Add `scale * r`, r a random direction with `E[(r . e)^2] = error(value + e)` for small errors e.

        In pieces: the logits of a window take hundreds of megabytes.

        Args:
            total: contiguous, of the output's shape; it is written to.
            scale: a factor.
            generator: gives the random numbers.
        """
        shape = (-1, self.value.shape[-1]) if self.is_logits else (-1,)
        at_once = max(1, _AT_ONCE // shape[-1]) if self.is_logits else _AT_ONCE
        values, sums = self.value.detach().reshape(shape), total.view(shape)
        for value, so_far in zip(values.split(at_once), sums.split(at_once), strict=True):
            so_far.add_(replace(self, value=value)._probe(generator), alpha=scale)

    def _probe(self, generator: torch.Generator) -> Tensor:
        """A random direction, of one number for each that is looked at at once."""
        if not self.is_logits:
            return _signs(self.value.shape, generator).mul_(self.counts()).to(self.value.dtype)
        # The score function of a sampled class: its covariance is the Fisher information.
        counts = self.counts()[:, None]
        probabilities = torch.where(counts, self.value, 0.0).float().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        scores = probabilities.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probabilities.dtype))
        # A random sign for each distribution keeps sums over distributions free of cross terms.
        return scores.mul_(_signs((len(scores), 1), generator)).mul_(counts).to(self.value.dtype)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.float32).mul_(2).sub_(1)


def leaves_of(output: Any, logits: Container[str] = (), task: str = "") -> list[Leaf]:
    """The floating tensors in what a model returned. Those that hold logits come twice: as numbers, and as logits.

    Args:
        output: a value of any type.
        logits: the paths of the outputs that are known to hold logits along their last dimension.
        task: that of the call.

    >>> [leaf.key for leaf in leaves_of({"logits": torch.zeros(2, 3), "boxes": [torch.zeros(4)]}, {"logits"})]
    [('logits', False, ''), ('logits', True, ''), ('boxes.0', False, '')]
    >>> [leaf.path for leaf in leaves_of((torch.zeros(2), torch.tensor([1])))], leaves_of(torch.zeros(2))[0].path
    (['0'], 'output')
    """
    found = []
    for path, tensor in _named(_results(output), ()):
        if tensor.is_floating_point() and tensor.numel():
            leaf = Leaf(tensor, path=path or "output", task=task)
            found.append(leaf)
            if leaf.path in logits and may_be_logits(tensor):
                found.append(replace(leaf, is_logits=True))
    return found


def may_be_logits(value: Tensor) -> bool:
    """Whether a tensor has a dimension of classes."""
    return value.dim() > 1 and value.shape[-1] > 1


def share_of_each(keys: Iterable[Key]) -> float:
    """What share of the damage an output's own damage makes up: all outputs count alike."""
    return 1.0 / max(1, len({(path, task) for path, _, task in keys}))


def _results(output: Any) -> Any:
    """Without the by-products, if the output is of a class of transformers and there is something else in it."""
    if not isinstance(output, Mapping) or not type(output).__module__.startswith("transformers."):
        return output
    results = {key: value for key, value in output.items() if key not in _BY_PRODUCTS}
    return results if tensors_of(results) else output


def _named(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, each with its path."""
    if isinstance(value, Tensor):
        yield ".".join(path), value
        return
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(str(i), part) for i, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(one.name, getattr(value, one.name)) for one in fields(value)]
    else:
        leaves = tree_leaves(value)
        parts = [] if len(leaves) == 1 and leaves[0] is value else [(str(i), part) for i, part in enumerate(leaves)]
    for name, part in parts:
        yield from _named(part, (*path, name))


def tensors_of(value: Any) -> list[Tensor]:
    """The floating tensors, except empty ones, in the arguments or the output of a module.

    >>> [tuple(found.shape) for found in tensors_of({"a": (torch.zeros(2), None), "b": torch.tensor([1])})]
    [(2,)]
    """
    tensors = [tensor for _, tensor in _named(value, ())]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
