"""What OpenVINO compiled outlives a process, beside the captured graphs: making it takes ten times as long as reading.

It holds the model's numbers, so the key covers these, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from pared.errors import reason_of
from pared.formats.dtypes import Array
from pared.model.tensors import named_tensors
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing.identity import key_of
from pared.runtime.graphs.capturing.kept import Checks, folder, is_own, write_own
from pared.runtime.kernels.machine import exact_products
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.openvino.graph import OpenVinoGraph, Parts
from pared.runtime.record import RECORD, Record
from pared.switches import ignoring, threads_asked

log = logging.getLogger(__name__)

_MOST: Final = 8  # of the size of the model's codes and more: MiniLM's takes 33 MB; the oldest go
_CHECKED: Final = ".checked"  # beside it, the calls for which it gave what the modules give
_CHECKSUM: Final = 32  # bytes, at the beginning of a file


def kept(
    model: nn.Module, skeleton: nn.Module, arguments: Sequence[Argument], made: Callable[[], OpenVinoGraph]
) -> OpenVinoGraph:
    """The graph of a call as it was made in an earlier process, or as it is made now.

    Args:
        model: the quantized model, or a submodel of it.
        skeleton: a float model of the same architecture.
        arguments: an example call.
        made: makes the graph.
    """
    threads = threads_asked()
    file = _file_of(model, skeleton, arguments, threads)
    found = None if file is None else _read(file, threads, made)
    if found is None:
        found = made()
        if file is not None:
            _keep(file, found)
    if file is not None:
        found.checks = Checks(file.with_suffix(_CHECKED))
    return found


def _file_of(model: nn.Module, skeleton: nn.Module, arguments: Sequence[Argument], threads: int) -> Path | None:
    """Where a graph is kept; None if it is not."""
    place = folder()
    if place is None:
        return None
    try:
        digest = hashlib.sha256(key_of(skeleton, arguments).encode())
        for part in (*_surroundings(), str(threads), *_numbers_of(model)):
            digest.update(part.encode() if isinstance(part, str) else part.data)
            digest.update(b"\0")
        return place / f"{digest.hexdigest()}.openvino"
    except Exception as error:  # noqa: BLE001  # whatever the model's own objects raise, the graph can be made
        log.debug("what OpenVINO compiles is not kept: %s", reason_of(error))
        return None


def _surroundings() -> Iterator[str]:
    """What decides how OpenVINO compiles a model, besides the model: its version, and what the processor can do."""
    yield from (metadata.version("openvino"), platform.node(), platform.processor(), str(exact_products()))
    yield torch.backends.cpu.get_cpu_capability()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        yield from sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def _numbers_of(model: nn.Module) -> Iterator[str | Array]:
    """The tensors of a model, which of them are codes, and on which grids inputs are rounded."""
    for name, tensor in named_tensors(model):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield _bytes_of(tensor)
    record: Record | None = vars(model).get(RECORD)
    if record is not None:
        for name, activation in sorted(record.activations.items()):
            yield f"{name} {activation!r}"
        for name, form in sorted(record.stored_forms.items()):  # which floats become codes again
            yield f"{name} {form.format!r} {form.view!r}"
            yield from (_bytes_of(part) for _, part in sorted(form.shared.items()))
    for name, module in model.named_modules():
        if isinstance(module, Counterpart):
            yield f"{name} {sorted(module.pared_views)} {module.pared_activation!r}"


def _bytes_of(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def _read(file: Path, threads: int, made: Callable[[], OpenVinoGraph]) -> OpenVinoGraph | None:
    """The graph in a file; None if there is none, or none that can be read."""
    try:
        if not file.is_file() or not is_own(file):
            return None
        data = file.read_bytes()
        if hashlib.sha256(data[_CHECKSUM:]).digest() != data[:_CHECKSUM]:
            raise ValueError("it is damaged")  # by which OpenVINO might end the process
        with ignoring():  # torch's warning about its own classes
            parts, compiled = pickle.loads(memoryview(data)[_CHECKSUM:])  # this user's own: see `is_own`
        if not isinstance(parts, Parts):
            raise TypeError("an earlier version wrote it in another form")
        found = OpenVinoGraph.again(parts, threads, compiled, made)
        with contextlib.suppress(OSError):  # a folder may be there to be read only
            os.utime(file)  # the oldest go first
        return found
    except Exception as error:  # noqa: BLE001  # whatever an old or damaged file raises, it is made again
        log.info("%s cannot be read (%s): the graph is made again", file, reason_of(error))
        return None


def _keep(file: Path, found: OpenVinoGraph) -> None:
    """Write a graph, if that is possible."""
    try:
        data = pickle.dumps((found.parts, found.compiled()))
        write_own(file, hashlib.sha256(data).digest() + data, _MOST)
    except Exception as error:  # noqa: BLE001  # whatever it is, the graph was made
        log.info("what OpenVINO compiled is not kept in %s: %s", file.parent, reason_of(error))
