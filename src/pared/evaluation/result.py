"""What an evaluation found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pared.evaluation.scoring import Sums


@dataclass(frozen=True)
class Evaluation:
    """How well a language model predicts a text, and how far it is from a reference.

    Means are over all scored tokens: over all of the text but its first token, which is scored only where the tokenizer
    puts a token in front.

    Args:
        tokens: how many tokens were scored, each once.
        loss: the mean of -log p(token), in nats per token.
        bits_per_byte: the loss in bits for each byte of the text in UTF-8; None if tokens were given instead of a text.
            Unlike the perplexity it compares models with different tokenizers.
        reference_loss: the loss of the reference, in nats per token; None without a reference.
        kl: the mean of KL(reference || model) = sum p_ref log(p_ref / p), in nats per token; None without a reference.
        agreement: at which share of the tokens the reference's most probable token is the model's, too: from 0 to 1;
            None without a reference.
        context: the most tokens that were read at once.
        stride: how many tokens each window went on.
        dtype: the type of the model's logits, such as "float32". All of the above is computed from them in double.
        windows: the sums of each window, in the order of the text.

    >>> result = Evaluation(100, 2.0, None, None, None, None, 512, 511, "float32")
    >>> round(result.perplexity, 3), round(result.bits_per_token, 3)
    (7.389, 2.885)
    """

    tokens: int
    loss: float
    bits_per_byte: float | None
    reference_loss: float | None
    kl: float | None
    agreement: float | None
    context: int
    stride: int
    dtype: str
    windows: tuple[Sums, ...] = field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss): of how many equally probable tokens one would be as unsure; infinite if a token has none."""
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float | None:
        """The perplexity of the reference; None without one."""
        return None if self.reference_loss is None else _exp(self.reference_loss)

    @property
    def bits_per_token(self) -> float:
        """The loss in bits per token: loss / log 2."""
        return self.loss / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """All of it but the windows, as plain values."""
        values = {name: value for name, value in asdict(self).items() if name != "windows"}
        derived = {"perplexity": self.perplexity, "reference_perplexity": self.reference_perplexity}
        return {**values, **derived, "windows": len(self.windows)}

    def __str__(self) -> str:
        """A line for each figure.

        >>> print(Evaluation(100, 2.0, 0.9, 1.9, 0.05, 0.93, 512, 511, "float32"))
        perplexity           7.389 (reference 6.686)
        bits per byte        0.9000
        KL to the reference  0.05000 nats per token
        top-1 agreement      93.00 %
        scored               100 tokens, windows of 512 that go on by 511, logits in float32
        """
        beside = "" if self.reference_perplexity is None else f" (reference {self.reference_perplexity:.4g})"
        lines = [("perplexity", f"{self.perplexity:.4g}{beside}")]
        if self.bits_per_byte is not None:
            lines.append(("bits per byte", f"{self.bits_per_byte:.4f}"))
        if self.kl is not None:
            lines.append(("KL to the reference", f"{self.kl:#.4g} nats per token"))
        if self.agreement is not None:
            lines.append(("top-1 agreement", f"{100 * self.agreement:.2f} %"))
        how = f"windows of {self.context} that go on by {self.stride}, logits in {self.dtype}"
        lines.append(("scored", f"{self.tokens:,} tokens, {how}"))
        return "\n".join(f"{name:<20} {value}" for name, value in lines)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # the largest double is exp(709.8)
