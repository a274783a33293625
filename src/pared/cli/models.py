"""Where `pared fit` starts, and what it writes: code or a Hugging Face folder; an artifact or files of a runtime."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import typer

import pared
from pared.artifact.beside import companions
from pared.errors import ConfigError
from pared.files.directories.whole import check_vacant
from pared.inspection.page import page
from pared.inspection.page.drawing import require_library
from pared.targets.table import TARGETS
from pared.targets.writers import check_described, writer_of

_BITS: Final = 8  # of a byte


class Source:
    """Where the float model comes from, and what is written of the small one.

    Args:
        model: PKG.MOD:FACTORY, or a Hugging Face folder.
        calib: PKG.MOD:OBJ, or the path of a text; None: no calibration data.
        target: a runtime; None: pared itself.
        output: the directory that will be written; None: none will.

    Raises:
        ConfigError: the runtime lacks its package, or does not run such a model.
        FileError: a file cannot be read; or there are other files where its files should be.
    """

    def __init__(self, model: str, calib: str | None, target: str | None, output: Path | None) -> None:
        self._folder = Path(model) if Path(model).is_dir() else None
        self._place, self._calib = model, calib
        self._target = TARGETS.get(target or "")
        self._writes = output is not None
        self._example: Any = None  # a batch
        if self._target is not None and self._target.takes == "weights":
            writer_of(self._target.name)
            if output is not None and not self._target.by_family:
                check_vacant(output)
            from pared.runtime.exporting.weights import config_of  # it needs torch, as every fit does

            check_described(self._target, config_of(self.model, self._folder), self._folder)

    @cached_property
    def model(self) -> Any:
        """The float model."""
        if self._folder is None:
            return built(self._place)
        from pared.fitting.hugging_face.loading import model_in  # it needs torch

        return model_in(self._folder)

    def size(self, max_size: int | str | None, bits: float | None) -> int | str | None:
        """The largest size: as given, or by bits for each number of the model."""
        if bits is None:
            return max_size
        if max_size is not None or not 0 < bits <= 32:
            raise ConfigError(
                f"--bits {bits:g} with --max-size" if max_size is not None else f"--bits {bits:g} is not a valid rate",
                where="pared fit",
                remedy="Pass one of them; --bits is above 0 and at most 32.",
            )
        return int(sum(parameter.numel() for parameter in self.model.parameters()) * bits / _BITS)

    def batches(self, most: int) -> Any:
        """Calibration data: the named object, or windows of a text.

        Raises:
            ConfigError: they are nothing of the kind, or have no batch to capture a graph from where one is needed.
        """
        found = self._batches(most)
        if self._writes and self._target is not None and self._target.takes == "graph":
            self._example = first_batch(found, self._target.name)
        return found

    def _batches(self, most: int) -> Any:
        if self._calib is None or (":" in self._calib and not Path(self._calib).is_file()):
            return batches(self._calib)
        if self._folder is None or not Path(self._calib).is_file():
            raise ConfigError(
                "is a text, which only the tokenizer of a Hugging Face folder reads"
                if Path(self._calib).is_file()
                else "is neither PKG.MOD:OBJ nor a file",
                where=f"--calib {self._calib}",
                remedy="Pass PKG.MOD:OBJ, or a folder as the model and a file of text.",
            )
        from pared.fitting.hugging_face.texts import windows_of  # it needs torch

        config = self.model.config
        longest = getattr(config, "max_position_embeddings", None)
        return windows_of(Path(self._calib), self._folder, longest, most)

    def write(self, model: Any, output: Path, quiet: bool) -> None:
        """Write the small model: pared's artifact with what was beside the weights, or the files of the runtime."""
        if self._target is None:
            path = pared.save(model, output)
            nbytes = path.stat().st_size
            if self._folder is not None:
                beside = companions.find_companions(self._folder, output)
                companions.copy(self._folder, beside.copied, output, output)
        else:
            try:
                done = pared.export(model, output, self._example, to=self._target.name, folder=self._folder)
            except BaseException:  # hours of work are not lost, whatever ends the writing
                typer.echo(f"what was fitted is kept: {pared.save(model, output)}", err=True)
                raise
            path, nbytes = done.path, done.nbytes
        html: Path | None = output / page.REPORT
        try:
            require_library()
        except ConfigError as error:
            typer.echo(f"no {page.REPORT}: {error}", err=True)
            html = None
        text = pared.report(model, html=html)
        if not quiet:
            typer.echo(f"{text}\n\nwritten: {path} ({nbytes:,} bytes)")


def first_batch(calibration: Any, target: str) -> Any:
    """The first batch of calibration data that can be read more than once."""
    if isinstance(calibration, Iterable) and not isinstance(calibration, Iterator):
        for batch in calibration:
            return batch
    raise ConfigError(
        f"{target} needs the graph of the model, which is captured from a batch",
        where="--calib",
        remedy="Pass a list of batches, or a DataLoader; with a Hugging Face folder also a file of text.",
    )


def named(place: str | None) -> Any:
    """The object that PKG.MOD:NAME refers to; None for None.

    Raises:
        ConfigError: it cannot be imported.
    """
    if place is None:
        return None
    module_name, _, attribute = place.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        target: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot be imported ({error})",
            where=place,
            remedy="Write PKG.MOD:NAME; the current directory is on the import path.",
        ) from error
    return target


def built(place: str) -> Any:
    """The model: the named object, or what it returns if it is a factory."""
    target = named(place)
    return target() if callable(target) and not hasattr(target, "state_dict") else target


def batches(place: str | None) -> Any:
    """Calibration data: batches, or a function that calls the model; a function without arguments makes either."""
    target = named(place)
    try:
        inspect.signature(target).bind()
    except (TypeError, ValueError):  # it takes arguments, or is not a function
        return target
    return target()
