"""The folds of a model, from the links of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pared.targets.families.family import BLOCK, Family, Link
from pared.targets.families.fold import Fold


def folds_of(family: Family, config: Mapping[str, Any], names: Iterable[str]) -> list[Fold]:
    """Where scales of input columns can go, block by block.

    Args:
        family: the model's.
        config: the content of its config.json.
        names: all tensors of its state dict, without the further names of tied ones. What is not whole is left out.
    """
    held = {family.plain(name): name for name in names}
    numbers = sorted({int(number) for name in held for number in re.findall(r"\.(\d+)\.", name)})
    found = []
    for link in family.links:
        for number in numbers if BLOCK in link.source else [0]:
            products = tuple(held.get(name) for name in _named(link.products, number))
            source = [held[name] for name in _tensors(link, number) if name in held]
            if source and None not in products:
                run, repeats = _shared_heads(config) if link.heads else (0, 1)
                offset = family.norm_offset if link.norm else 0.0
                found.append(Fold(tuple(source), tuple(map(str, products)), run, repeats, offset))
    return found


def _named(modules: Iterable[str], number: int) -> Iterator[str]:
    for module in modules:
        yield f"{module.replace(BLOCK, str(number))}.weight"


def _tensors(link: Link, number: int) -> tuple[str, str]:
    module = link.source.replace(BLOCK, str(number))
    return f"{module}.weight", f"{module}.bias"


def _shared_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """The rows of a head of values, and how many heads read it; (0, 1) if each head has its own."""
    heads = config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    if shared == heads:
        return 0, 1
    return config.get("head_dim") or config["hidden_size"] // heads, heads // shared
