"""Where `pared fit` starts, and what it writes: code or a Hugging Face folder; an artifact or files of a runtime."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import typer

import pared
from pared.checkpoints.pretrained import folder as pretrained
from pared.errors import ConfigError, ModelError
from pared.executors.executor import Executor
from pared.files.directories.whole import check_vacant
from pared.inspection.page import page
from pared.inspection.page.drawing import require_library
from pared.targets.table import TARGETS
from pared.targets.target import Target
from pared.targets.writers import check_described, writer_of
from pared.terminal import parse_size

_BITS: Final = 8  # of a byte


class Source:
    """Where the float model comes from, and what is written of the small one.

    Args:
        model: PKG.MOD:FACTORY, or a Hugging Face folder.
        calib: PKG.MOD:OBJ, or the path of a text or of token ids; None: no calibration data.
        target: a runtime; None: pared itself.
        output: the directory that will be written; None: none will.

    Raises:
        ConfigError: the runtime lacks its package, or does not run such a model; or the folder would be overwritten.
        FileError: a file cannot be read; or there are other files where its files should be.
    """

    def __init__(self, model: str, calib: str | None, target: str | None, output: Path | None) -> None:
        self._folder = Path(model) if Path(model).is_dir() else None
        self._place, self._calib = model, calib
        self._target = TARGETS.get(target or "")
        self._writes = output is not None
        self._example: Any = None  # a batch
        self._most: int | None = None  # bytes of the file
        self._generates = False  # whether it is written as a language model with its cache
        if self._folder is not None and output is not None:
            pretrained.check_apart(self._folder, output)
        if self._target is not None and self._target.takes == "weights":
            writer_of(self._target.name)
            if output is not None and not self._target.by_family:
                check_vacant(output)
            from pared.runtime.exporting.weights import architecture_of  # it needs torch, as every fit does

            check_described(self._target, architecture_of(self._architecture, self._folder), self._folder)
        elif self._target is not None and self._writes and self._folder is not None:
            from pared.runtime.exporting.exporters import is_written_generating  # likewise

            self._generates = is_written_generating(self._target, self._architecture, self._folder)
        if self._folder is not None and output is not None and (self._target is None or self._generates):
            pretrained.check_replaceable(output)

    @cached_property
    def model(self) -> Any:
        """The float model."""
        if self._folder is None:
            return built(self._place)
        from pared.fitting.hugging_face.loading import model_in  # it needs torch

        return model_in(self._folder)

    def size(self, max_size: int | str | None, bits: float | None) -> int | str | None:
        """The largest size: as given, or by bits for each number of the model."""
        found = self._size(max_size, bits)
        self._most = None if found is None else parse_size(found)
        return found

    def _size(self, max_size: int | str | None, bits: float | None) -> int | str | None:
        if bits is None:
            return max_size
        if max_size is not None:
            raise ConfigError(f"--bits {bits:g} with --max-size", where="pared fit", remedy="Pass one of them.")
        if not 0 < bits <= 32:
            raise ConfigError(
                f"--bits {bits:g} is not a valid rate",
                where="pared fit",
                remedy="Pass a number above 0 and at most 32.",
            )
        return int(self._numbers * bits / _BITS)

    @cached_property
    def _architecture(self) -> Any:
        """The model, of a folder without its weights."""
        if self._folder is None:
            return self.model
        from pared.fitting.hugging_face.loading import architecture_in  # it needs torch

        return architecture_in(self._folder)

    @cached_property
    def _numbers(self) -> int:
        """How many the weights of the model are; those of a folder are not read."""
        if self._folder is None:
            return sum(parameter.numel() for parameter in self.model.parameters())
        from pared.fitting.hugging_face.loading import numbers_in  # it needs torch

        return numbers_in(self._folder)

    def is_too_large(self) -> bool:
        """Whether it is a folder whose model cannot be fitted as a whole in the memory of this machine."""
        if self._folder is None:
            return False
        from pared.fitting.hugging_face.memory import fits_whole  # it needs torch

        return not fits_whole(self._numbers)

    def fit_by_block(
        self,
        conf: Any,
        functions: tuple[Any, Any],
        workspace: Path | None,
        output: Path,
        quiet: bool,
        executor: Executor,
    ) -> None:
        """Fit the model of a folder one block at a time, on one machine or many, and write its files and report.

        Raises:
            ConfigError: it is not a folder.
            ParedError: as `pared.fit` of a path.
        """
        from pared.fitting.streamed.front import fit_path  # it needs torch

        folder, data = self._of_folder(conf)
        found = fit_path(folder, conf, data, functions, workspace, output, quiet, executor)
        self._warn(found.nbytes)
        self._tell(found.report, output, found.path, found.nbytes, quiet)

    def estimate(self, conf: Any, *, by_block: bool) -> Any:
        """About how large and slow the result will be; by block also where the model is too large for the memory.

        Raises:
            ParedError: as `pared.estimate`.
        """
        if by_block or self.is_too_large():
            folder, data = self._of_folder(conf)
            return pared.estimate(folder, conf, data)
        return pared.estimate(self.model, conf, self.batches(conf.calibration_sampling_size))

    def batches(self, most: int) -> Any:
        """Calibration data: the named object, or windows of the text or the tokens that it holds.

        Raises:
            ConfigError: they are nothing of the kind, or have no batch to capture a graph from where one is needed.
        """
        found = self._batches(most)
        if self._writes and self._target is not None and self._target.takes == "graph":
            self._example = first_batch(found, None if self._generates else self._target.name)
        return found

    def trade_off_by_block(
        self, conf: Any, function: Any, workspace: Path | None, quiet: bool, executor: Executor
    ) -> Any:
        """What each size would cost, with one block of a folder's model in memory at a time.

        Raises:
            ConfigError: it is not a folder.
            ParedError: as `pared.trade_off`.
        """
        folder, data = self._of_folder(conf)
        return pared.trade_off(folder, conf, data, function, workspace=workspace, quiet=quiet, executor=executor)

    def _of_folder(self, conf: Any) -> tuple[Path, Any]:
        """The folder, and calibration data for its model."""
        if self._folder is None:
            raise ConfigError(
                "--by-block and --workers are for a Hugging Face folder",
                where=self._place,
                remedy="Pass a folder, or leave it out.",
            )
        return self._folder, self._batches(conf.calibration_sampling_size)

    @property
    def _is_file(self) -> bool:
        """Whether the calibration data are a file."""
        return self._calib is not None and Path(self._calib).is_file()

    def _batches(self, most: int) -> Any:
        is_file = self._is_file
        if self._calib is not None and not is_file and ":" not in self._calib:
            raise ConfigError(
                "is neither PKG.MOD:OBJ nor a file",
                where=f"--calib {self._calib}",
                remedy="Pass PKG.MOD:OBJ, or a folder as the model and a file of text.",
            )
        if self._folder is None:
            if is_file:
                raise ConfigError(
                    "is a text, which only the tokenizer of a Hugging Face folder reads",
                    where=f"--calib {self._calib}",
                    remedy="Pass PKG.MOD:OBJ, or a folder as the model and a file of text.",
                )
            return batches(self._calib)
        from pared.fitting.hugging_face.sources import batches_of  # it needs torch

        found = self._calib if is_file else batches(self._calib)
        return None if found is None else batches_of(found, self._folder, most)

    def score(self, place: str | None) -> Any:
        """A function that scores a model: the named one; with a folder, how well it predicts a text.

        Raises:
            ConfigError: it cannot be imported.
            FileError: the text or the folder's tokenizer cannot be read.
        """
        if place is None or self._folder is None or not Path(place).is_file():
            return named(place)
        from pared.evaluation.scores import text_score  # these need torch
        from pared.fitting.hugging_face.texts import tokenizer_in

        return text_score(Path(place), tokenizer_in(self._folder))

    def write(self, model: Any, output: Path, quiet: bool) -> None:
        """Write the small model: pared's artifact, beside what else a Hugging Face folder has; or a runtime's files."""
        if self._target is None:
            path = pared.save(model, output, container="pt" if self._folder is None else "safetensors")
            nbytes = path.stat().st_size
            if self._folder is not None:
                pretrained.complete(path, self._folder, type(model).__name__)
        else:
            try:
                done = self._exported(model, output, self._target)
            except BaseException:  # hours of work are not lost, whatever ends the writing
                typer.echo(f"what was fitted is kept: {pared.save(model, output)}", err=True)
                raise
            path, nbytes = done.path, done.nbytes
            self._warn(nbytes)
        self._tell(lambda html: pared.report(model, html=html), output, path, nbytes, quiet)

    def _exported(self, model: Any, output: Path, target: Target) -> Any:
        """Write a runtime's files: of a language model those that generate, else those of one call."""
        if self._generates:
            try:
                return pared.export(model, output, to=target.name, folder=self._folder)
            except ModelError as error:
                typer.echo(f"warning: one call is written, without a cache: {error}", err=True)
        return pared.export(model, output, self._example, to=target.name, folder=self._folder)

    def _warn(self, nbytes: int) -> None:
        """Say so if the files of a runtime are larger than was asked for."""
        if self._target is not None and self._most is not None and nbytes > self._most:
            typer.echo(_too_large(nbytes, self._most, self._target), err=True)

    def _tell(self, report: Callable[[Path | None], str], output: Path, path: Path, nbytes: int, quiet: bool) -> None:
        """Write the report beside what was written, and show it."""
        html: Path | None = output / page.REPORT
        try:
            require_library()
        except ConfigError as error:
            typer.echo(f"no {page.REPORT}: {error}", err=True)
            html = None
        text = report(html)
        if not quiet:
            typer.echo(f"{text}\n\nwritten: {path} ({nbytes:,} bytes)")


def _too_large(nbytes: int, most: int, target: Target) -> str:
    """What to say of a file that is larger than was asked for: what is beside the weights shows when it is written."""
    beside = "the operators of the graph" if target.takes == "graph" else "the tokenizer"
    return (
        f"warning: {nbytes:,} bytes were written, {nbytes - most:,} more than {most:,}: {beside} come on top of the "
        f"weights. --max-size {max(most - (nbytes - most), 0)} makes it fit."
    )


def first_batch(calibration: Any, target: str | None) -> Any:
    """The first batch of calibration data that can be read more than once.

    Args:
        calibration: the data.
        target: the runtime that needs it; None: without it, None is returned.
    """
    if isinstance(calibration, Iterable) and not isinstance(calibration, Iterator):
        for batch in calibration:
            return batch
    if target is None:
        return None
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
