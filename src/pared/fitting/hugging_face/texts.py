"""A text as calibration data of a language model: windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pared.checkpoints.runtimes.conversion import config_of
from pared.errors import CalibrationError, FileError, reason_of
from pared.files.disk import reading
from pared.fitting.hugging_face.loading import transformers_for

WINDOW: Final = 512  # tokens
_BATCHED: Final = 1 << 20  # characters that are tokenized at once
# What configurations call the most tokens that a model takes.
_LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")
_LONGER: Final = "Pass a longer text: some hundred windows of the kind that the model will read."


@dataclass(frozen=True)
class Limits:
    """What a model takes.

    Args:
        longest: the most tokens in a call; None: not known.
        rows: those of its table of tokens; None: not known.
    """

    longest: int | None = None
    rows: int | None = None

    @property
    def window(self) -> int:
        """The tokens in a window."""
        return min(WINDOW, self.longest or WINDOW)


def limits_in(folder: Path) -> Limits:
    """What the model of a folder takes, by its config.json.

    Raises:
        ConfigError, CorruptError: there is none, or it is not a JSON object.
    """
    return limits_of(config_of(folder, "Pass a Hugging Face folder."))


def limits_of(config: Any) -> Limits:
    """What a model takes, by its configuration.

    Args:
        config: what config.json holds, or an object of transformers or of any other class. A model of texts and images
            has the part that counts under "text_config".

    >>> limits_of({"vocab_size": 9, "text_config": {"max_position_embeddings": 64, "n_positions": None}})
    Limits(longest=64, rows=9)
    """
    found = {**_fields(config), **_fields(_fields(config).get("text_config"))}
    lengths = [found[name] for name in _LENGTHS if isinstance(found.get(name), int) and found[name] > 1]
    rows = found.get("vocab_size")
    return Limits(min(lengths, default=None), rows if isinstance(rows, int) else None)


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    known: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    return known


def windows_of(file: Path, folder: Path, longest: int | None, most: int) -> list[dict[str, Tensor]]:
    """The tokens of a text in windows, one after the other; what is left at the end is not used.

    Args:
        file: the text, in UTF-8.
        folder: where the tokenizer is.
        longest: the most tokens that the model takes; None if that is not known.
        most: the number of windows that are needed.

    Returns:
        arguments of the model, one window each: "input_ids", int64 (1, tokens).

    Raises:
        CalibrationError: the text is shorter than one window, or a token has no row in the model's table.
        FileError: the text is not in UTF-8, or it or the tokenizer cannot be read.
    """
    text = text_in(file)
    rows = limits_in(folder).rows if (folder / "config.json").is_file() else None
    limits = Limits(longest, rows)
    ids = tokenized(text, tokenizer_in(folder), most * limits.window)
    return windows([ids], limits, most, str(file))


def tokens_of(texts: Iterable[object], tokenizer: Any) -> Iterable[Sequence[int]]:
    """The tokens of texts, without those that a tokenizer puts around a text.

    Raises:
        CalibrationError: one is not a text.
    """
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            what = f"text {place} is a {type(text).__name__}"
            raise CalibrationError(what, where="calibration data", remedy="Leave out rows without a text.")
        yield tokenized(text, tokenizer)


def windows(pieces: Iterable[Sequence[int]], limits: Limits, most: int, where: str) -> list[dict[str, Tensor]]:
    """Tokens one after the other, cut into windows; what is left at the end is not used.

    Raises:
        CalibrationError: there are fewer than one window has, or one has no row in the model's table.
    """
    length = limits.window
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        if len(ids) >= most * length:
            break
    count = min(most, len(ids) // length)
    if not count:
        raise CalibrationError(f"has {len(ids)} tokens, and a window has {length}", where=where, remedy=_LONGER)
    return [sample(ids[start : start + length], limits, where) for start in range(0, count * length, length)]


def sample(ids: Sequence[int], limits: Limits, where: str) -> dict[str, Tensor]:
    """Tokens as arguments of a model.

    Raises:
        CalibrationError: one has no row in the model's table, or is not an integer.
    """
    numbers = np.asarray(ids)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        what = f"a sample is {numbers.dtype} with {numbers.ndim} dimensions, not token ids"
        raise CalibrationError(what, where=where, remedy="Pass integers, a list of them for each sample.")
    found = torch.from_numpy(numbers.astype(np.int64)).reshape(1, -1)
    least, largest = int(found.min()), int(found.max())
    if least < 0 or (limits.rows is not None and largest >= limits.rows):
        raise CalibrationError(
            f"has token {least if least < 0 else largest}, and the model's table has {limits.rows or 'no such'} rows",
            where=where,
            remedy="Use the tokenizer that the model was trained with.",
        )
    return {"input_ids": found}


def text_in(file: Path) -> str:
    """A text in UTF-8.

    Raises:
        FileError: it is not in UTF-8, or cannot be read.
    """
    with reading(file):
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileError(
                f"is not a text in UTF-8: byte {error.start:,} is {error.object[error.start]:#04x}",
                where=str(file),
                remedy="Convert it, for example with iconv -f latin1 -t utf-8.",
            ) from error


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; code in the folder is never run.

    Raises:
        ConfigError: transformers is not installed.
        FileError: there is no tokenizer that it can read.
    """
    transformers = transformers_for(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a library makes of a stranger's tokenizer
        raise FileError(
            f"has no tokenizer that transformers can read ({reason_of(error)})",
            where=str(folder),
            remedy="Put tokenizer.json into the folder, or pass tokens instead of a text.",
        ) from error


def tokenized(text: str, tokenizer: Any, most: int | None = None) -> list[int]:
    """The tokens of a text, without those that mark its beginning and end; a megabyte at a time.

    Args:
        text: any text.
        tokenizer: one of transformers.
        most: stop when there are this many; there may be more. Default: all.
    """
    ids: list[int] = []
    for start in range(0, len(text), _BATCHED):
        ids += tokenizer(text[start : start + _BATCHED], add_special_tokens=False, verbose=False)["input_ids"]
        if most is not None and len(ids) >= most:
            break
    return ids
