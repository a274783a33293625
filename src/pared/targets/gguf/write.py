"""The writer of GGUF files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from pared.errors import ConfigError
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.directories.temporary import temporary_folder
from pared.files.directories.writable import writing_to
from pared.files.disk import as_path, make_directory
from pared.formats.groups.grid import Floats
from pared.targets.families.table import family_of
from pared.targets.gguf.layout import Entry, laid_out
from pared.targets.gguf.metadata import add_general, add_pooling, add_settings, extra_tensors
from pared.targets.gguf.tokenizer import add_tokenizer, read_tokenizer
from pared.targets.pieces import Source

FILE: Final = "model.gguf"  # in a directory


def write(source: Source, path: Path) -> list[Path]:
    """Write a model as one GGUF file, a tensor at a time.

    Args:
        source: the model.
        path: the file; or a directory, where it is called model.gguf.

    Returns:
        the file.

    Raises:
        ConfigError: the model cannot be written as it is; nothing was.
        FileError: a file cannot be read or written.
    """
    path = as_path(path, "export")
    path = path if path.suffix == ".gguf" else path / FILE
    family = family_of(source.config)
    entries = laid_out(source.outlines, family, source.config)
    table = next((entry for entry in entries if entry.name == "token_embd.weight"), None)
    if table is None:
        raise ConfigError(
            f"the model has no table of tokens, which a {family.name} has",
            where="config.json",
            remedy="Pass the configuration that belongs to the model.",
        )
    tokenizer = read_tokenizer(source.folder, table.shape[0])
    make_directory(path.parent)
    with owned(path.parent, wait=SHORT_WAIT), writing_to(path.parent), temporary_folder(path.parent) as folder:
        made = folder / path.name
        name = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.gguf]]
        with contextlib.closing(gguf.GGUFWriter(made, name)) as writer:
            add_general(writer, source, entries)
            add_settings(writer, family, source.config, table.shape[0])
            add_tokenizer(writer, tokenizer, source.folder)
            if family.output == "states" and source.folder is not None:
                add_pooling(writer, source.folder)
            _write_tensors(writer, source, entries, extra_tensors(family, source.config))
        made.replace(path)
    return [path]


def _write_tensors(
    writer: gguf.GGUFWriter, source: Source, entries: Sequence[Entry], extra: Mapping[str, Floats]
) -> None:
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for entry in entries:
        writer.write_tensor_data(entry.pack(source.read(entry.outline)))
