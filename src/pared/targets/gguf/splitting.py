r"""How text is split before tokens are made of the pieces: tokenizer.json says it in full, llama.cpp by a name.

Names are those of `tokenizer.ggml.pre` (llama-vocab.cpp), each with the expressions that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pared.errors import ConfigError

KEY: Final = "tokenizer.ggml.pre"  # in tokenizer_config.json it says the name where it is not known here

_PLURALS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER: Final = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_START: Final = r"[^\r\n\p{L}\p{N}]?"


def _cased(ending: str) -> str:
    return f"{_START}[{_UPPER}]*[{_LOWER}]+{ending}|{_START}[{_UPPER}]+[{_LOWER}]*{ending}"


_NAMES: Final[Mapping[tuple[str, ...], str]] = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (rf"{_PLURALS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
    (rf"{_PLURALS}|{_START}\p{{L}}+|\p{{N}}|{_REST}", "bytes"): "qwen2",
    (rf"{_PLURALS}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
     r"|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes"): "qwen35",
    (rf"{_cased('')}|\p{{N}}|{_SLASHED}", "bytes"): "tekken",
    (rf"{_cased(_PLURALS + '?')}|\p{{N}}{{1,3}}|{_SLASHED}", "bytes"): "gpt-4o",
}  # fmt: skip


def splitting_of(pre_tokenizer: Mapping[str, Any] | None, named: object, where: str) -> str:
    """The name by which llama.cpp knows how a tokenizer splits text.

    Args:
        pre_tokenizer: from tokenizer.json.
        named: what tokenizer_config.json says under `KEY`; it comes first.
        where: for messages.

    Raises:
        ConfigError: it is not known.

    >>> splitting_of({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, None, "tokenizer.json")
    'gpt-2'
    """
    if isinstance(named, str) and named:
        return named
    steps = tuple(_steps(pre_tokenizer or {}))
    if steps in _NAMES:
        return _NAMES[steps]
    raise ConfigError(
        f"splits text in a way that is not known here: {' then '.join(steps) or 'not at all'}",
        where=where,
        remedy=f"Known are {', '.join(_NAMES.values())}. If llama.cpp knows it by another name, write that into "
        f'tokenizer_config.json: "{KEY}": "NAME".',
    )


def _steps(step: Mapping[str, Any]) -> Iterator[str]:
    kind = step.get("type")
    if kind == "Sequence":
        for one in step["pretokenizers"]:
            yield from _steps(one)
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        yield "bytes of words" if step.get("use_regex", True) else "bytes"
    elif kind == "Digits" and step.get("individual_digits"):
        yield "digits"
    elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        yield str(step["pattern"].get("Regex"))
    elif kind:
        yield f"{kind} {dict(step)}"
