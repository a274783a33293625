"""ONNX: a quantized model as a graph of standard operators, its weights as codes and steps."""

from __future__ import annotations

import importlib
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from pared.artifact.envelope import find_artifact
from pared.errors import ConfigError, FileError
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.directories.temporary import temporary_folder
from pared.files.directories.writable import writing_to
from pared.files.disk import as_path, make_directory, reading
from pared.model.calls import bind
from pared.model.contents import Contents
from pared.runtime.onnx.capture import Dynamic, capture, dimensions_of, shape_of
from pared.runtime.onnx.fixed import tell_fixed
from pared.runtime.onnx.rewrite import rewrite
from pared.runtime.onnx.signature import SIGNATURE
from pared.runtime.onnx.weights.grouped import AccuracyLevel
from pared.version import __version__

log = logging.getLogger(__name__)

ARTIFACT: Final = "pared.artifact"  # the key in the file's metadata of the checksum of the artifact beside it
ONNX_FILE: Final = "model.onnx"  # beside the artifact
_INLINE_BYTES: Final = 1_900_000_000  # a protobuf message holds 2 GB: more than this goes to a second file


@dataclass(frozen=True)
class Exported:
    """What was written for a runtime.

    Args:
        path: the file; the folder, where there are several.
        nbytes: the size in bytes of all files with numbers, and of their graph.
        inputs: the shape of each input of a graph by name; dimensions that may vary are names.
        outputs: likewise of its outputs; None where a shape is unknown.
        codes: the names of the tensors that are held as codes.
        floats: the tensors that the quantized model holds as codes and a graph as floats, each with the reason.
        activations: for each layer that may run in int8: "static" if its input is rounded to the calibrated grid, or
            "float" if only its weights are integers (a runtime may still round its input), or "groups" if ONNX Runtime
            rounds it to int8, in groups as large as those of the weight.
    """

    path: Path
    nbytes: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...] | None]
    codes: tuple[str, ...]
    floats: Mapping[str, str]
    activations: Mapping[str, str]


def need(package: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"needs the package {package}, which could not be imported ({error})",
            where=extra,
            remedy=f"pip install 'pared[{extra}]'",
        ) from error


def export_onnx(
    floats: nn.Module,
    contents: Contents,
    path: str | Path,
    inputs: Any,
    dynamic: Dynamic = True,
    accuracy_level: AccuracyLevel = 4,
) -> Exported:
    """Write an ONNX file.

    Args:
        floats: the float model with the weights that the codes stand for.
        contents: the codes and steps, and how layers treat their inputs.
        path: as for `pared.export`.
        inputs: as for `pared.export`.
        dynamic: as for `pared.export`.
        accuracy_level: how products with weights in groups treat their inputs: 0: in floats; 4: rounded to int8, in
            groups as large as the weight's, which is faster, with an error of about half a percent.
    """
    for package in ("onnx", "onnxscript"):
        need(package, "onnx")
    path = as_path(path, "export")
    path = path if path.suffix == ".onnx" else path / ONNX_FILE
    make_directory(path.parent)  # before the work, not after
    args, kwargs = bind(floats, inputs, "example inputs")
    names = {name for one in contents.tensors if "codes" in one.coded.parts for name in one.names}
    captured = capture(floats, args, kwargs, dynamic, names)
    found = rewrite(captured.model, contents, accuracy_level)
    captured.model.producer_name, captured.model.producer_version = "pared", __version__
    captured.model.metadata_props[SIGNATURE] = captured.signature.to_json()
    captured.model.metadata_props[ARTIFACT] = checksum_beside(path)
    nbytes = _write(captured.model, path)
    for name, because in found.floats.items():
        log.warning("%s holds %s as floats: %s", path.name, name, because)
    graph = captured.model.graph
    shapes = {name: one.shape for name, one in captured.signature.inputs.items()}
    signature, call = captured.signature, captured.call
    tell_fixed(path, floats, call, signature.inputs, dimensions_of(call, dynamic, signature))
    outputs = {value.name: shape_of(value) for value in graph.outputs}
    return Exported(path, nbytes, shapes, outputs, found.coded, found.floats, found.activations)


def checksum_beside(path: Path) -> str:
    """The checksum of the artifact in a file's directory; empty if there is none."""
    try:
        file = find_artifact(path.parent)
    except FileError:
        return ""
    with reading(file):
        return f"{zlib.crc32(file.read_bytes()):08x}"


def _write(model: Any, path: Path) -> int:
    """Write and check under a temporary name, then rename: a crash leaves the old file or the new one."""
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}.data" if size > _INLINE_BYTES else None
    with owned(path.parent, wait=SHORT_WAIT), writing_to(path.parent), temporary_folder(path.parent) as folder:
        made = Path(folder) / path.name
        onnx_ir.save(model, made, external_data=beside)
        onnx.checker.check_model(str(made))
        written = 0
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the numbers before the graph that names them
            written += file.stat().st_size
            file.replace(path.with_name(file.name))
    return written
