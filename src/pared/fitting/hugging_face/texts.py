"""A text as calibration data of a language model: windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pared.errors import CalibrationError, FileError
from pared.files.disk import reading
from pared.fitting.hugging_face.loading import transformers_for

WINDOW: Final = 512  # tokens
_BATCHED: Final = 1 << 20  # characters that are tokenized at once


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
        CalibrationError: the text is shorter than one window.
        FileError: the text or the tokenizer cannot be read.
    """
    transformers = transformers_for(folder)
    with reading(file):
        text = file.read_text(encoding="utf-8")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise FileError(
            f"has no tokenizer that transformers can read ({type(error).__name__})",
            where=str(folder),
            remedy="Put tokenizer.json into the folder, or pass --calib PKG.MOD:OBJ.",
        ) from error
    length = min(WINDOW, longest or WINDOW)
    ids: list[int] = []
    for start in range(0, len(text), _BATCHED):
        ids += tokenizer(text[start : start + _BATCHED], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= most * length:
            break
    count = min(most, len(ids) // length)
    if not count:
        raise CalibrationError(
            f"has {len(ids)} tokens, and a window has {length}",
            where=str(file),
            remedy="Pass a longer text: some hundred windows of the kind that the model will read.",
        )
    rows = torch.tensor(ids[: count * length]).reshape(count, 1, length)
    return [{"input_ids": row} for row in rows]
