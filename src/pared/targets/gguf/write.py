"""The writer of GGUF files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from pared.errors import ConfigError, ParedError
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
    with _settings("config.json"):
        entries = laid_out(source.outlines, family, source.config)
        extra = extra_tensors(family, source.config)
    table = next((entry for entry in entries if entry.name == "token_embd.weight"), None)
    if table is None:
        raise ConfigError(
            f"the model has no table of tokens, which a {family.name} has",
            where="config.json",
            remedy="Pass the configuration that belongs to the model.",
        )
    writer = _described(source.config, source.folder, table.shape[0])
    add_general(writer, source, entries)
    make_directory(path.parent)
    with owned(path.parent, wait=SHORT_WAIT), writing_to(path.parent), temporary_folder(path.parent) as folder:
        made = folder / path.name
        with contextlib.closing(writer):
            _write_tensors(writer, made, source, entries, extra)
        made.replace(path)
    return [path]


def check(config: Mapping[str, Any], folder: Path | None) -> None:
    """Refuse, before any work, a configuration or a tokenizer that `write` refuses.

    Args:
        config: the content of config.json.
        folder: where the tokenizer is.

    Raises:
        ConfigError: llama.cpp does not run such a model, or does not know such a tokenizer.
        FileError: a file cannot be read.
    """
    rows = config.get("vocab_size")
    _described(config, folder if rows else None, rows or 0)
    with _settings("config.json"):
        extra_tensors(family_of(config), config)


@contextlib.contextmanager
def _settings(where: str) -> Iterator[None]:
    """Errors of settings that are missing, or of a wrong kind."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ParedError):
            raise
        raise ConfigError(
            f"lacks a setting, or has one that makes no sense ({type(error).__name__}: {error})",
            where=where,
            remedy="Compare it with the file that was published with the model, or fetch it again.",
        ) from error


def _described(config: Mapping[str, Any], folder: Path | None, rows: int) -> gguf.GGUFWriter:
    """A file, still in memory, that says what llama.cpp needs besides the tensors."""
    family = family_of(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.gguf]])
    with _settings("config.json"):
        add_settings(writer, family, config, rows)
    with _settings("tokenizer.json"):
        add_tokenizer(writer, read_tokenizer(folder, rows), folder)
    if family.output == "states" and folder is not None:
        add_pooling(writer, folder)
    return writer


def _write_tensors(
    writer: gguf.GGUFWriter, path: Path, source: Source, entries: Sequence[Entry], extra: Mapping[str, Floats]
) -> None:
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for entry in entries:
        writer.write_tensor_data(entry.pack(source.read(entry.outline)))
