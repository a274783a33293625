"""`pared.calibration`: whatever holds text or tokens as calibration data of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pared.errors import CalibrationError, ConfigError, reason_of
from pared.files.disk import as_path, reading
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.texts import Limits, limits_in, sample, tokenizer_in, tokens_of, windows, windows_of
from pared.scalars import checked_number

Sample: TypeAlias = dict[str, Tensor]
_WHERE: Final = "pared.calibration"
_KINDS: Final = (
    "Pass the path of a text or of a .npy file, an array or lists of token ids, texts, or rows with a column "
    "input_ids, messages or text, as a datasets.Dataset has them."
)


def calibration(source: Any, folder: str | Path, *, samples: int | None = None) -> list[Sample]:
    """Calibration data of a language model, for `fit`: windows of at most 512 tokens, and no more than the model takes.

    Args:
        source: one of

            * the path of a text in UTF-8, whose tokens are cut into windows one after the other;
            * texts: an iterable of strings, read as one text;
            * token ids: a path that ends in `.npy`, a tensor or array of integers, or lists. One dimension is cut into
              windows; of two, each row is a sample;
            * rows: a `datasets.Dataset`, streamed or not, or any iterable of mappings. The first of these columns that
              there is counts: "input_ids", a sample each; "messages", which the tokenizer's chat template turns into a
              sample each; "text", read as one text.
        folder: the Hugging Face folder of the model, with config.json and, for texts, the tokenizer. Code in it is
            never run.
        samples: the largest number of windows; default: what `fit` reads, `calibration_sampling_size`.

    Returns:
        batches, one sample each: "input_ids", int64 (1, tokens).

    Raises:
        CalibrationError: there is less than one window, no column that is known, or nothing at all; or a token has no
            row in the model's table.
        ConfigError: `source` is nothing of the kind, or there is no chat template.
        FileError: a file or the tokenizer cannot be read.

    >>> import json, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps({"vocab_size": 100, "n_positions": 4}))
    ...     [batch["input_ids"].tolist() for batch in calibration(range(10), folder)]
    [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    """
    place = as_path(folder, _WHERE)
    limits = limits_in(place)
    most = PostTrainingQuantConfig.calibration_sampling_size if samples is None else samples
    most = checked_number(_WHERE, "samples", most, least=1, whole=True)
    if isinstance(source, (str, Path)):
        path = as_path(source, _WHERE)
        if path.suffix != ".npy":
            return windows_of(path, place, limits.longest, most)
        with reading(path):
            try:
                ids = np.load(path, mmap_mode="r", allow_pickle=False)
            except EOFError as error:
                raise ValueError("it is empty") from error
            return _of_array(ids, limits, most, str(path))
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _of_array(source, limits, most, _WHERE)
    first, rest = _peeked(source)
    if isinstance(first, str):
        return windows(tokens_of(rest, tokenizer_in(place)), limits, most, _WHERE)
    if isinstance(first, Mapping):
        return _of_rows(first, rest, place, limits, most)
    if isinstance(first, (int, np.integer)):
        return windows(([one] for one in rest), limits, most, _WHERE)
    if isinstance(first, (Sequence, np.ndarray, Tensor)):
        return _alone(rest, limits, most, _WHERE)
    raise ConfigError(f"cannot make calibration data of a {type(first).__name__}", where=_WHERE, remedy=_KINDS)


def _peeked(source: Any) -> tuple[Any, Iterator[Any]]:
    """The first of an iterable, and all of it."""
    if not isinstance(source, Iterable):
        raise ConfigError(f"cannot make calibration data of a {type(source).__name__}", where=_WHERE, remedy=_KINDS)
    rest = iter(source)
    for first in rest:
        return first, chain([first], rest)
    raise CalibrationError("is empty", where=_WHERE, remedy=_KINDS)


def _of_array(ids: NDArray[Any], limits: Limits, most: int, where: str) -> list[Sample]:
    """Token ids: of one dimension as one text, of two a sample in each row."""
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ConfigError(
            f"is an array of {ids.dtype} with {ids.ndim} dimensions, not of token ids",
            where=where,
            remedy="Pass integers, of one dimension, or of two with a sample in each row.",
        )
    if ids.ndim == 2:
        return _alone(ids, limits, most, where)
    return windows([ids[: most * limits.window].tolist()], limits, most, where)


def _of_rows(
    first: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], folder: Path, limits: Limits, most: int
) -> list[Sample]:
    """Rows with columns."""
    name = next((name for name in _COLUMNS if name in first), None)
    if name is None:
        raise CalibrationError(
            f"has no column {', '.join(_COLUMNS)}; it has {', '.join(map(str, first)) or 'none'}",
            where=_WHERE,
            remedy='Rename one: dataset.rename_column("content", "text").',
        )
    return _COLUMNS[name]((row[name] for row in rows), folder, limits, most)


def _alone(samples: Iterable[Any], limits: Limits, most: int, where: str) -> list[Sample]:
    """Each sample on its own, no longer than a window; empty ones do not count."""
    found: Iterator[Any] = (one[: limits.window] for one in samples if len(one))
    made = [sample(ids, limits, where) for ids in islice(found, most)]
    if not made:
        raise CalibrationError("has no sample with a token in it", where=where, remedy=_KINDS)
    return made


def _texts(column: Iterable[str], folder: Path, limits: Limits, most: int) -> list[Sample]:
    return windows(tokens_of(column, tokenizer_in(folder)), limits, most, "column text")


def _ids(column: Iterable[Any], _folder: Path, limits: Limits, most: int) -> list[Sample]:
    return _alone(column, limits, most, "column input_ids")


def _conversations(column: Iterable[Any], folder: Path, limits: Limits, most: int) -> list[Sample]:
    tokenizer = tokenizer_in(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "its tokenizer has no chat template, which turns messages into text",
            where=str(folder),
            remedy='Pass a column "text", or put chat_template.jinja into the folder.',
        )
    return _alone((_told(messages, tokenizer) for messages in column), limits, most, "column messages")


def _told(messages: Any, tokenizer: Any) -> Any:
    """The tokens of a conversation."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program, with errors of its own
        raise CalibrationError(
            f"the chat template does not take a row ({reason_of(error)})",
            where="column messages",
            remedy='Pass lists of {"role": ..., "content": ...}, as the model was trained with.',
        ) from error


# The first that a row has says what it is.
_COLUMNS: Final[Mapping[str, Callable[[Iterable[Any], Path, Limits, int], list[Sample]]]] = {
    "input_ids": _ids,
    "messages": _conversations,
    "text": _texts,
}


def is_batches(found: Any) -> bool:
    """Whether calibration data are arguments of a model, or a function that calls it, rather than something to read.

    Tensors are token ids here; batches of them are in lists of mappings or tuples.

    >>> import torch
    >>> is_batches(lambda model: None), is_batches([{"input_ids": torch.ones(1, 4)}]), is_batches(["a text"])
    (True, True, False)
    """
    if callable(found):
        return True
    if not isinstance(found, Iterable) or isinstance(found, (str, Path, Tensor, np.ndarray)):
        return False
    if not isinstance(found, Sequence) or not len(found):
        return not hasattr(found, "column_names")
    first = found[0]
    values = first.values() if isinstance(first, Mapping) else [first] if isinstance(first, Tensor) else first
    return isinstance(first, (Mapping, tuple, Tensor)) and any(isinstance(one, Tensor) for one in values)


def batches_of(given: Any, folder: Path, most: int) -> Any:
    """Calibration data as `fit` takes them: what is ready as it is, anything else as `calibration` reads it.

    Args:
        given: batches, a function that calls the model, or a source of `calibration`.
        folder: the Hugging Face folder of the model.
        most: the largest number of windows.

    Raises:
        CalibrationError, ConfigError, FileError: as `calibration`.
    """
    return given if is_batches(given) else calibration(given, folder, samples=most)
