"""What the tensors of a checkpoint are to a runtime, judged by their names, shapes and family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pared.checkpoints.selection import Kept
from pared.errors import ConfigError
from pared.formats.dtypes import FLOATING
from pared.targets.families.family import Family
from pared.targets.families.table import family_of
from pared.targets.target import Role, Target, is_stack

_TABLES: Final = re.compile(r"embed_tokens|embed_in|wte|shared|(word|tok|token)?_?embeddings?")
# Tables of positions and of kinds of tokens, which stay in float.
# The head of GPT-NeoX is called embed_out.
_SMALL_TABLES: Final = re.compile(r"(?!embed_out$)\w*embed\w*|wpe|relative_attention_bias")
# Linear layers whose outputs choose experts: few weights, and every runtime keeps them in float.
_ROUTERS: Final = frozenset(("gate", "router", "shared_expert_gate"))


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint that will be written.

    Args:
        kept: the tensor.
        role: what it is.
        transposed: its matrix has the inputs in dimension 0.
    """

    kept: Kept
    role: Role
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All its names; those of tables come first, since models tie their heads to them."""
        return tuple(sorted(self.kept.names, key=lambda name: not _is_table(name)))

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices, such as those of experts."""
        return is_stack(self.kept.held.shape) and self.kept.held.dtype in FLOATING and not self.kept.exact

    @property
    def matrix(self) -> tuple[int, int]:
        """The rows and columns of its matrix; only of one that has a role."""
        rows, columns = self.kept.held.shape
        return (columns, rows) if self.transposed else (rows, columns)


def weights_of(kept: Sequence[Kept], config: Mapping[str, Any], target: Target) -> list[Weight]:
    """The tensors that a runtime reads, and what each is to it.

    Raises:
        ConfigError: the runtime knows only some architectures, and this is none of them.
    """
    family = family_of(config) if target.by_family else family_if_known(config)
    found = []
    for one in kept:
        if target.by_family and family is not None and not family.uses(one.name):
            continue
        transposed = family is not None and _module(one.name) in family.transposed
        found.append(Weight(one, role_of(one), transposed))
    return found


def family_if_known(config: Mapping[str, Any]) -> Family | None:
    """The family of a model; None if it is none that is known."""
    try:
        return family_of(config)
    except ConfigError:
        return None


def role_of(kept: Kept) -> Role:
    """What a tensor is: a matrix in a numbered block belongs to a linear layer, one outside of them makes logits."""
    if kept.exact or len(kept.held.shape) != 2 or kept.held.dtype not in FLOATING or 0 in kept.held.shape:
        return "other"
    names = [name for name in kept.names if name.endswith(".weight")]
    if any(_is_table(name) for name in names):
        return "table"
    if not names or _module(names[0]) in _ROUTERS or _SMALL_TABLES.fullmatch(_module(names[0])):
        return "other"
    return "linear" if any(part.isdigit() for part in names[0].split(".")) else "head"


def _is_table(name: str) -> bool:
    return _TABLES.fullmatch(_module(name)) is not None


def _module(name: str) -> str:
    """The last part of the name of a tensor's module."""
    return name.split(".")[-2] if "." in name else ""
