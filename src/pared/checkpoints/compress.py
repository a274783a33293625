"""`pared compress`: a checkpoint to an artifact, tensor by tensor, without torch and without the model's code."""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from pared import readers
from pared.artifact.beside import companions
from pared.artifact.beside.companions import Companions, find_companions
from pared.artifact.envelope import FILE_NAMES, Records
from pared.artifact.index import Index
from pared.artifact.parse import parse_index
from pared.artifact.torch_file import write_torch
from pared.checkpoints.folders.forms import check_forms
from pared.checkpoints.folders.layout import metadata_of, record
from pared.checkpoints.folders.sources import check_kept, check_places
from pared.checkpoints.journal import Journal
from pared.checkpoints.packing import FLOAT_BITS, INT8_BITS, Fineness
from pared.checkpoints.pretrained.folder import check_replaceable
from pared.checkpoints.quantized.recognize import REMEDY, Quantization, recognize, unrounded
from pared.checkpoints.result import Compressed, joined
from pared.checkpoints.runtimes.conversion import CONFIG
from pared.checkpoints.runtimes.writing import Goal, goal_of, write_for
from pared.checkpoints.sampling import SizeModel
from pared.checkpoints.selection import Kept, contained, is_adapter, select
from pared.checkpoints.tasks.packing import Work
from pared.errors import ConfigError
from pared.executors.executor import Executor, LocalExecutor
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.directories.whole import check_vacant
from pared.files.disk import as_path, make_directory, reading, write_atomic
from pared.files.remote.urls import output_at, source_at, written_at
from pared.readers.folders.files import find_files
from pared.readers.folders.hub import snapshot_of
from pared.readers.folders.manifests import model_parts
from pared.readers.listing import Listing
from pared.readers.sent import SentListing
from pared.scalars import plain
from pared.targets.table import OWN
from pared.terminal import parse_size
from pared.version import __version__

log = logging.getLogger(__name__)

_Part = Literal["whole", "top", "inside"]
_VERSION: Final = 1  # of the rounding: a journal written by another version is discarded


def compress(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    bits: float | None = None,
    max_size: int | str | None = None,
    target: str | None = None,
    quiet: bool = True,
    executor: Executor | None = None,
) -> Path:
    """Compress a checkpoint without the model's code, tensor by tensor: `pared.load(directory, model=...)` reads it.

    The format of each tensor is decided by its own numbers alone; with the model and data at hand, `pared.fit` does
    better. A run that was killed continues where it stopped when it is called again.

    Args:
        path: a `.safetensors` file; a `.pt`, `.pth` or `.bin` that torch wrote; one of several shards, for all of
            them; or a folder of Hugging Face, whose other files are copied too. Optimizer states, other training data,
            values that are not tensors, and duplicates are left out. A URL ("s3://...") of any of these is copied to
            this machine first, as far as it has changed.
        directory: where `best_model.pt` is written; created if it is missing. The models of a pipeline of diffusers,
            or of sentence-transformers, are each written into their own folder in it, as the source has them. Or a
            URL where nothing is: files are sent there when all are written.
        bits: average bits per weight of each coded tensor, above 0 and below 16, or 16 for float16. At 8, the default
            without `max_size`, each row has the finest int8 step.
        max_size: instead of bits, the largest size of the file in bytes: 12000000, "12MB" or "12MiB".
        target: a runtime, for which the weights are rounded to formats that it executes and written as it reads them,
            instead of an artifact: "gguf", "compressed-tensors", "gptq", "mlx". Default: "pared" itself. The source
            has to be a Hugging Face folder, and nothing may be in `directory`. Then `bits` is the average over all
            weights in the runtime's file, embeddings and what it keeps in float too; and one of `bits` and `max_size`
            has to be given.
        quiet: whether to hide the progress bar.
        executor: `pared.RayExecutor(...)` for workers on many machines, which have to see the source at the same path
            and give the same bytes. Default: the cores of this one.

    Returns:
        the path of the artifact; of a folder of several models, `directory`. Of a checkpoint that another tool has
        quantized (GPTQ, AWQ, bitsandbytes, ...) every tensor is stored bit for bit, whatever `bits` is, and a warning
        says so.

    Raises:
        ConfigError: the options contradict each other, the size cannot be reached, or the directory holds another model
            with a config.json, which that of the source would replace.
        FileError: the source cannot be read, or the directory cannot be written; CorruptError and UnsafeError are such.
        ModelError: a weight is NaN or infinite.
        WorkerError: a worker does not see the source, or cannot do the work.

    Extra state of modules in a state dict (`get_extra_state`) is stored as plain data; what only a pickle could store
    is a FileError.
    """
    with output_at(directory, "compress") as output:
        asked: dict[str, Any] = {"bits": bits, "max_size": max_size, "target": target}
        done = run(path, output, **asked, quiet=quiet, executor=executor)
    return written_at(directory, done.path)


def run(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    bits: float | None = None,
    max_size: int | str | None = None,
    target: str | None = None,
    quiet: bool = False,
    executor: Executor | None = None,
) -> Compressed:
    """Do what `compress` does; return its result with sizes, times and what was left out."""
    source, output = source_at(path, "compress"), as_path(directory, "compress")
    executor = executor or LocalExecutor()
    if target not in (None, OWN):
        assert target is not None
        if not isinstance(executor, LocalExecutor):
            raise ConfigError(
                f"the files of {target} are written by one process",
                where="compress with workers",
                remedy="Leave the workers out, or compress for pared and export the artifact.",
            )
        return _for_runtime(source, output, goal_of(target, bits, max_size), quiet=quiet)
    rate, size = _checked(bits, max_size)
    source = snapshot_of(source) if source.is_dir() else source
    parts = model_parts(source) if source.is_dir() else ()
    if parts:
        return _each(source, output, parts, rate, size, executor, quiet=quiet)
    return _run(source, output, rate, size, executor, quiet=quiet)


def _for_runtime(source: Path, output: Path, goal: Goal, *, quiet: bool) -> Compressed:
    """Write the weights of a Hugging Face folder as a runtime reads them."""
    source = snapshot_of(source) if source.is_dir() else source
    check_places(source, output)
    check_vacant(output)
    with readers.open_listing(source) as listing:
        chosen, quantized = contained(listing), recognize(listing)
        if quantized is not None:
            raise ConfigError(f"{quantized}: nothing of it may be rounded again", where=str(source), remedy=REMEDY)
        check_kept(chosen.kept, chosen.listing)
        check_forms(listing)
        return write_for(source, output, chosen, goal, quiet=quiet)


def _each(
    source: Path, output: Path, parts: Sequence[str], rate: float, size: int | None, executor: Executor, *, quiet: bool
) -> Compressed:
    """Compress the models of which a folder consists, each into its own folder; nothing is written before all pass."""
    if size is not None:
        raise ConfigError(
            f"max_size cannot be divided among the {len(parts)} models of {source}",
            where="compress",
            remedy="Pass bits, or compress each of its folders with a size of its own.",
        )
    taken: list[str] = []
    for part in parts:
        check_places(source / part, output / part)
        with readers.open_listing(source / part, part=not part) as listing:
            taken += [f"{part}/{name}".lstrip("/") for name in listing.files]
            check_kept(select(listing, compare=False).kept, listing)
            check_forms(listing)
    beside = find_companions(source, output, taken)
    for part in parts:
        if f"{part}/{CONFIG}".lstrip("/") in beside.copied:
            check_replaceable(output / part)
    done = {}
    for part in parts:
        own: _Part = "inside" if part else "top"
        done[part] = _run(source / part, output / part, rate, None, executor, quiet=quiet, part=own)
    with owned(output, wait=SHORT_WAIT):
        companions.copy(source, beside.copied, output, output)
    return joined(done, output, beside)


def _run(
    source: Path,
    output: Path,
    rate: float,
    size: int | None,
    executor: Executor,
    *,
    quiet: bool,
    part: _Part = "whole",
) -> Compressed:
    """Compress one model.

    Args:
        source: the file or folder.
        output: the directory.
        rate: bits per weight, used only without a size.
        size: the largest size of the file in bytes; None: as the rate has it.
        executor: packs the tensors.
        quiet: whether to hide the progress bar.
        part: "whole"; or of a folder of several models, whose other files are copied with that folder, the one in its
            "top" folder or one "inside".
    """
    began = time.perf_counter()
    check_places(source, output)
    with readers.open_listing(source, part=part == "top") as listing:
        chosen, quantized = contained(listing), recognize(listing)
        if quantized is not None:
            chosen = replace(chosen, kept=unrounded(chosen.kept, quantized))
            log.warning("%s: %s: nothing of it is rounded", source, quantized)
        check_kept(chosen.kept, chosen.listing)
        check_forms(listing)
        beside = Companions((), {}) if part != "whole" else _beside(source, output, listing)
        if CONFIG in beside.copied:
            check_replaceable(output)
        if quantized is not None and size is not None:
            _check_exact_size(listing, chosen.kept, size)
        sent = SentListing(chosen.listing, source, part == "top")
        executor.check_files(sent.files)
        make_directory(output)
        files = _files(source, listing, chosen.kept)
        depends = _depends(source, listing, chosen.kept, rate, size)
        with Journal(output, depends) as journal:
            journal.keep(chosen.kept)
            resumed = len(journal.entries)
            if resumed:
                log.info("%s: %d tensors are taken from an earlier run", output, resumed)
            work = Work(sent, chosen.kept, journal, executor, quiet)
            work.at_rate(rate) if size is None or quantized is not None else work.within(
                size - sum(len(json.dumps(one)) for one in (chosen.states, files) if one)
            )
            target = output / FILE_NAMES["pt"]
            asked = {"bits": rate} if size is None else {"max_size": size}
            provenance = {"pared": __version__, "compress": asked, **files}
            index = Index(tuple(journal.entries), {}, provenance, chosen.states).to_bytes()
            with journal.opened() as data:  # parse the index as a reader will; checksums protect the numbers
                parse_index(Records(str(journal.folder), len(index) + len(data), index, data))
            with owned(output, wait=SHORT_WAIT):  # the files belong together
                companions.copy(source, beside.copied, output, journal.folder)
                write_atomic(
                    target, lambda file: write_torch(file, index, journal.data(), journal.end), within=journal.folder
                )
            journal.remove()
    return Compressed(
        target,
        source_nbytes=listing.nbytes - sum(note.nbytes for note in listing.notes.values() if note.file),
        weight_nbytes=sum(one.held.nbytes for one in chosen.kept),
        nbytes=target.stat().st_size,
        seconds=time.perf_counter() - began,
        left_out=chosen.left_out,
        copied=beside.copied,
        resumed=resumed,
        not_copied=beside.left,
        about=_about(listing, quantized),
        plain=listing.plain,
    )


def _about(listing: Listing, quantized: Quantization | None) -> str:
    """What the user has to know about a source that is not a whole model, or more than weights, or fewer bits."""
    if quantized is not None:
        return f"nothing was rounded: {quantized}. {REMEDY}"
    if is_adapter(listing):
        return "an adapter of PEFT: the model that it was trained for is not in it"
    places = tuple(f"({name}: " for name in listing.files) or ("(",)
    if any(name.startswith(places) and name.endswith("graph)") for name in listing.notes):
        return "left out: the graph of the model; expand gives its weights alone"
    return ""


def _files(source: Path, listing: Listing, kept: Sequence[Kept]) -> dict[str, Any]:
    """What is recorded about the files of the source: of one that was given alone, only what it says about itself."""
    return metadata_of(listing) | (record(listing, kept) if source.is_dir() or len(listing.files) > 1 else {})


def _beside(source: Path, output: Path, listing: Listing) -> Companions:
    """The files beside the weights; of a file that was given alone, none."""
    if not source.is_dir():
        return Companions((), {})
    unread = {name.strip("()") for name, note in listing.notes.items() if note.file}
    return find_companions(source, output, [name for name in find_files(source).sizes if name not in unread])


def _depends(source: Path, listing: Listing, kept: Sequence[Kept], bits: float, size: int | None) -> dict[str, Any]:
    """Everything that the artifact's bytes depend on; a journal that depends on anything else is discarded."""
    files = listing.files.values() if listing.files else [source]
    with reading(source):
        stats = [[file.name, stat.st_size, stat.st_mtime_ns] for file in files for stat in [file.stat()]]
    tensors = zlib.crc32(repr([(one.names, one.held, one.exact) for one in kept]).encode())
    asked = {"bits": bits, "max_size": size, "version": f"{__version__}/{_VERSION}"}
    return {"source": str(source.resolve()), "files": stats, "tensors": tensors, **asked}


def _checked(bits: float | None, max_size: int | str | None) -> tuple[float, int | None]:
    """The rate in bits per weight, used only without a size; and the size limit in bytes."""
    if max_size is not None:
        if bits is not None:
            raise ConfigError("bits and max_size exclude each other", where="compress", remedy="Give one of them.")
        return INT8_BITS, parse_size(max_size)
    rate = INT8_BITS if bits is None else plain(bits)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (0 < rate < FLOAT_BITS or rate == FLOAT_BITS):
        raise ConfigError(
            f"bits={bits!r} is not a valid rate",
            where="compress",
            remedy="Use a number above 0 and below 16, or 16 for float16.",
        )
    return rate, None


def _check_exact_size(listing: Listing, kept: Sequence[Kept], most: int) -> None:
    """Refuse a size that tensors which may not be rounded exceed."""
    nbytes = SizeModel(listing, kept).nbytes([Fineness()] * len(kept))
    if nbytes > most:
        raise ConfigError(
            f"{most:,} bytes are too few: nothing may be rounded, and so it takes about {nbytes:,}, since "
            f"{kept[0].exact}",
            where="max_size",
            remedy=REMEDY,
        )
