"""Logits against the tokens that came, and against the logits of a reference; in double, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pared.errors import EvaluationError

_PIECE: Final = 1 << 21  # numbers of a matrix of logits that are in double at once: 16 MiB, a few times over


@dataclass(frozen=True)
class Sums:
    """What the tokens of a window add up to.

    Args:
        tokens: how many were scored.
        loss: the sum of -log p(token), in nats.
        reference_loss: the same of the reference; None without one.
        kl: the sum of KL(reference || model), in nats; None without a reference.
        agreed: at how many places the reference's first choice is a first choice of the model; None without one.
    """

    tokens: int
    loss: float
    reference_loss: float | None = None
    kl: float | None = None
    agreed: int | None = None


def score(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> Sums:
    """Compare the logits of a window with its tokens and, if there is one, with the reference.

    Args:
        logits: logarithms of unnormalized probabilities, floating (tokens, vocabulary); minus infinity is a probability
            of 0.
        targets: the tokens that came, int64 (tokens,).
        reference: the logits of another model at the same places, of the same shape; its probabilities p weigh the
            logarithms in KL = sum p (log p - log q).

    Raises:
        EvaluationError: some logits are NaN or plus infinity.
    """
    rows = max(1, _PIECE // logits.shape[-1])
    loss, reference_loss, kl, agreed = 0.0, 0.0, 0.0, 0
    for begin in range(0, len(targets), rows):
        part = slice(begin, begin + rows)
        own = _log_probabilities(logits[part], "the model")
        loss -= _of(own, targets[part])
        if reference is not None:
            theirs = _log_probabilities(reference[part], "the reference")
            reference_loss -= _of(theirs, targets[part])
            # Where the reference has a probability of 0 the summand is 0, whatever the model says.
            summands = torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - own))
            kl += float(summands.sum())
            # Logits in bfloat16 often have several largest ones: any of them is a first choice.
            chosen = own.gather(-1, theirs.argmax(-1, keepdim=True)).squeeze(-1)
            agreed += int((chosen == own.amax(-1)).sum())
    if reference is None:
        return Sums(len(targets), loss)
    return Sums(len(targets), loss, reference_loss, kl, agreed)


def _of(logarithms: Tensor, targets: Tensor) -> float:
    return float(logarithms.gather(-1, targets[:, None]).sum())


def _log_probabilities(logits: Tensor, whose: str) -> Tensor:
    """The logarithm of the softmax, in double."""
    logits = logits.double()
    normalizer = logits.logsumexp(-1, keepdim=True)
    if not bool(normalizer.isfinite().all()):  # of NaN, of plus infinity, or of nothing but minus infinity
        raise EvaluationError(
            f"the logits of {whose} hold NaN or infinity",
            where="pared.evaluate",
            remedy="Call the model on a line of the text to find out why; float16 overflows where bfloat16 does not.",
        )
    return logits - normalizer
