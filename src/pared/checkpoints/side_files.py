"""The files beside the weights: with its configuration and tokenizer, a folder of Hugging Face stays usable."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from pared.files.disk import write_atomic, writing_to

# Other forms of the same weights, by suffix, which nobody needs beside the compressed ones.
_WEIGHTS: Final = frozenset(
    (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2", ".onnx", ".onnx_data", ".gguf", ".npz", ".h5", ".keras",
     ".msgpack", ".tflite", ".ot")
)  # fmt: skip
# The folders in which sentence-transformers keeps the layers behind a model: their weights are no copies.
_LAYER: Final = re.compile(r"\d+_\w+$")
_INDEX: Final = ".index.json"
_OURS: Final = frozenset(("deploy.yaml", "engine.json"))


def find_side_files(folder: Path, output: Path) -> Iterator[str]:
    """The files of a folder that are no weights, by their paths in it, in order.

    Args:
        folder: of the source.
        output: what is in here is left out, should it be within the folder.
    """
    destination = os.path.realpath(output)
    for place, directories, names in os.walk(folder):
        here = Path(place)
        # Hidden folders hold caches and histories.
        seen = (name for name in directories if not name.startswith("."))
        directories[:] = sorted(name for name in seen if os.path.realpath(here / name) != destination)
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and path.is_file() and (_LAYER.match(here.name) or not _is_weights(name)):
                yield path.relative_to(folder).as_posix()


def _is_weights(name: str) -> bool:
    """Whether a file holds weights, says where they are, or goes with an artifact."""
    return Path(name).suffix in _WEIGHTS or name.endswith(_INDEX) or name in _OURS


def copy(folder: Path, names: Collection[str], output: Path, within: Path) -> None:
    """Copy files, each whole or not at all.

    Raises:
        FileError: one cannot be read or written.
    """
    with writing_to(output):
        for name in names:
            with (folder / name).open("rb") as source:
                write_atomic(output / name, lambda file, source=source: shutil.copyfileobj(source, file), within=within)  # type: ignore[misc]  # bound now
