"""One family of architectures: what feeds what in it, and where its tensors differ from what other runtimes hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLOCK = "{block}"  # stands for the number of a block in names of modules


@dataclass(frozen=True)
class Link:
    """A module and every linear layer that reads its output, by their names in a state dict.

    Args:
        source: a norm, or a linear layer from which only products lead on.
        products: nothing else reads the source's output.
        heads: the source makes the values of attention, of which some heads may be shared.
        norm: the source is a norm, to whose weight `Family.norm_offset` is added.
    """

    source: str
    products: tuple[str, ...]
    heads: bool = False
    norm: bool = True


@dataclass(frozen=True)
class Family:
    """Architectures that differ in their numbers only.

    Args:
        name: as messages and tables show it.
        architectures: the classes of transformers that config.json may name.
        gguf: the architecture in `gguf.MODEL_ARCH`.
        links: what shares an input, and what makes that input.
        paired: linear layers whose rows rotary positions turn in pairs: Hugging Face keeps the halves of a head apart,
            GGUF the two of a pair together. Each is the last part of the module's name, with the setting that says how
            many heads it has.
        transposed: last parts of names of linear layers whose weights have the inputs in dimension 0.
        norm_offset: what norms add to their weights before they use them; runtimes expect the sum.
        prefixes: what the names of tensors may begin with, depending on the class.
        unused: beginnings or ends of names of tensors that no runtime reads.
        output: "logits", or "states": an encoder without a head.
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str
    links: tuple[Link, ...] = ()
    paired: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    output: Literal["logits", "states"] = "logits"

    def plain(self, name: str) -> str:
        """The name of a tensor without the prefix of its class."""
        return next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)

    def uses(self, name: str) -> bool:
        """Whether runtimes read a tensor of this name."""
        plain = self.plain(name)
        return not any(plain.startswith(part) or plain.endswith(part) for part in self.unused)
