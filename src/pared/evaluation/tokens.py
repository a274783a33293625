"""What is scored: a text or its tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pared.errors import ConfigError, EvaluationError
from pared.fitting.hugging_face.texts import text_in, tokenized

_WHERE: Final = "pared.evaluate"
_INTEGERS: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as a model reads it.

    Args:
        ids: int64 (tokens,).
        prefix: the tokens that the tokenizer puts before a text, to mark its beginning; each window gets them.
        nbytes: the bytes of the text that are scored, in UTF-8; None if they are not known.
    """

    ids: Tensor
    prefix: tuple[int, ...] = ()
    nbytes: int | None = None


def tokens_of(text: str | os.PathLike[str] | Sequence[int] | Tensor, tokenizer: Any = None) -> Tokens:
    """The tokens of a text, or tokens as they are.

    Args:
        text: the text itself; the path of a file of text in UTF-8 (a `Path`, not a string); or token ids, integers
            (tokens,).
        tokenizer: one of transformers; only for texts.

    Raises:
        ConfigError: a text without a tokenizer, the name of a file in a string, or something else.
        EvaluationError: there are fewer than two tokens, so that none follows another.
        FileError: the file cannot be read.
    """
    where = _WHERE
    if isinstance(text, os.PathLike):
        where = os.fspath(text)
        text = text_in(Path(text))
    if isinstance(text, str):
        _check_text(text)
        found = _read(text, tokenizer)
    else:
        found = Tokens(_ids(text))
    if len(found.ids) < 2:
        raise EvaluationError(
            f"has {len(found.ids)} tokens, and none can be predicted from the ones before",
            where=where,
            remedy="Pass a text of two tokens or more; some thousand give a figure that can be relied on.",
        )
    return found


def _check_text(text: str) -> None:
    """Refuse the name of a file, of which a few tokens would be scored."""
    try:
        is_file = len(text) < 1000 and "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # no name of a file
        return
    if is_file:
        raise ConfigError(
            f"text={text!r} is the name of a file", where=_WHERE, remedy=f"Pass pathlib.Path({text!r}) for its content."
        )


def _read(text: str, tokenizer: Any) -> Tokens:
    if not callable(tokenizer):
        raise ConfigError(
            "there is no tokenizer for the text" if tokenizer is None else "the tokenizer cannot be called with a text",
            where=_WHERE,
            remedy="Pass tokenizer=, one of transformers, or token ids instead of a text.",
        )
    ids = tokenized(text, tokenizer)
    prefix = _prefix(text[:100], tokenizer)
    nbytes = len(text.encode())
    if not prefix and ids:  # then the first token is not scored
        nbytes -= len(_first(text, ids[0], tokenizer).encode())
    return Tokens(torch.tensor(ids, dtype=torch.int64), prefix, nbytes)


def _prefix(text: str, tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _first(text: str, token: int, tokenizer: Any) -> str:
    """The characters of the first token."""
    if getattr(tokenizer, "is_fast", False):
        places = tokenizer(text[:1000], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: places[0][1]]
    return str(tokenizer.decode([token]))


def _ids(values: Any) -> Tensor:
    """Token ids as a tensor; a batch of one text is that text."""
    try:
        ids = torch.as_tensor(np.asarray(values)) if not isinstance(values, Tensor) else values
    except (TypeError, ValueError):  # of different lengths, or of something else
        ids = torch.tensor(0.5)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or (ids.dtype not in _INTEGERS and ids.numel()):
        raise ConfigError(
            f"a {type(values).__name__} is neither a text nor its tokens",
            where=_WHERE,
            remedy="Pass a str, a Path of a text, or a list or tensor of token ids of one dimension.",
        )
    return ids.detach().cpu().to(torch.int64)
