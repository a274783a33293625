"""Which weights must have one format, because a runtime joins them: the rules of `Target.alike` applied to names."""

from __future__ import annotations

from collections.abc import Sequence


def joined(name: str, alike: Sequence[Sequence[str]]) -> str | None:
    """What a weight is joined with: equal for all those that must be alike; None for one on its own.

    Args:
        name: the weight's, or its module's.
        alike: as in `Target`: the parts of names that a runtime joins within one block.

    >>> rules = [("q_proj", "k_proj"), ("experts",)]
    >>> joined("layers.0.attn.k_proj.weight", rules) == joined("layers.0.attn.q_proj.weight", rules)
    True
    >>> joined("layers.0.experts.3.up.weight", rules), joined("layers.0.attn.o_proj.weight", rules)
    ('layers.0.(experts)', None)
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        for rule in alike:
            if part in rule:
                return ".".join([*parts[:i], f"({' '.join(rule)})"])
    return None
