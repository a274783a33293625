"""OpenVINO's own files: a captured call with integer weights, which OpenVINO opens without a conversion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import fx, nn

from pared.errors import ModelError, reason_of
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.directories.temporary import temporary_folder
from pared.files.directories.writable import writing_to
from pared.files.disk import as_path, make_directory
from pared.model.calls import bind
from pared.model.contents import Contents
from pared.runtime.graphs.capturing.capture import capturing, functional, placeholders
from pared.runtime.onnx.capture import Dynamic, dimensions_of, names_of, program_of
from pared.runtime.onnx.export import ARTIFACT, Exported, checksum_beside, need
from pared.runtime.onnx.fixed import tell_fixed
from pared.runtime.onnx.signature import SIGNATURE, GraphInput, Signature, tensors_of
from pared.runtime.openvino.conversion import Filled, filled

log = logging.getLogger(__name__)

OPENVINO_FILE: Final = "openvino_model.xml"  # the name that other tools look for

_REMEDY: Final = 'export(..., to="onnx") writes a file that OpenVINO reads as well, unless a table is in groups.'


def export_openvino(
    floats: nn.Module, contents: Contents, path: str | Path, inputs: Any, dynamic: Dynamic = True
) -> Exported:
    """Write a file of OpenVINO, and the file of numbers beside it.

    Args:
        floats: the float model with the weights that the codes stand for.
        contents: the codes and steps, and how layers treat their inputs.
        path: the ".xml" file, or a directory; the numbers are in the ".bin" file beside it.
        inputs: as for `pared.export`.
        dynamic: as for `pared.export`.

    Raises:
        ModelError: the model cannot be captured, or OpenVINO does not know an operator of it.
    """
    need("openvino", "openvino")
    path = as_path(path, "export")
    path = path if path.suffix == ".xml" else path / OPENVINO_FILE
    make_directory(path.parent)  # before the work, not after
    args, kwargs = bind(floats, inputs, "example inputs")
    program, call, signature = program_of(floats, args, kwargs, dynamic)
    with capturing():
        program = functional(program)
    found, shapes = in_openvino(program, floats, contents)
    names, outputs = names_of(signature)
    given = {
        name: GraphInput.of(tensor, shape) for name, tensor, shape in zip(names, tensors_of(call), shapes, strict=True)
    }
    signature = replace(signature, inputs=given)
    _name(found.model, names, outputs, shapes)
    _tell(found.model, signature, path)
    nbytes = write({path.name: found.model}, path)
    tell_fixed(path, floats, call, signature.inputs, dimensions_of(call, dynamic, signature))
    ends = {name: _shape(found.model.output(i)) for i, name in enumerate(outputs)}
    return described(found, contents, path, nbytes, {name: one.shape for name, one in given.items()}, ends)


def described(
    found: Filled,
    contents: Contents,
    path: Path,
    nbytes: int,
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...] | None],
) -> Exported:
    """What was written; what it holds as floats is told as well."""
    for name, because in found.floats.items():
        log.warning("%s holds %s as floats: %s", path.name, name, because)
    activations = {
        name: "static" if name in found.static else "float"
        for name, one in contents.activations.items()
        if one.mode != "gather"
    }
    return Exported(path, nbytes, inputs, outputs, tuple(sorted(found.coded)), found.floats, activations)


def in_openvino(program: Any, floats: nn.Module, contents: Contents) -> tuple[Filled, list[tuple[int | str, ...]]]:
    """A program of `torch.export` in OpenVINO, and the shapes of its inputs: names for sizes that may vary.

    Raises:
        ModelError: OpenVINO does not know an operator of it.
    """
    begin = placeholders(program)
    shapes = [tuple(map(_size, value.shape)) for value in begin.inputs.values()]
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    try:
        return filled(graph, floats, contents, begin.tensors, begin.constants, narrow=True), shapes
    except Exception as error:  # whatever the runtime makes of a graph
        raise ModelError(
            f"OpenVINO cannot take it: {reason_of(error)}", where=type(floats).__name__, remedy=_REMEDY
        ) from error


def _name(model: Any, inputs: list[str], outputs: list[str], shapes: list[tuple[int | str, ...]]) -> None:
    """Give inputs and outputs their names, and inputs the sizes that may not vary."""
    import openvino

    if (len(model.inputs), len(model.outputs)) != (len(inputs), len(outputs)):
        raise ModelError(
            f"OpenVINO made {len(model.inputs)} inputs and {len(model.outputs)} outputs of a call with {len(inputs)} "
            f"and {len(outputs)}: some are not used, or are the same",
            where="graph",
            remedy=_REMEDY,
        )
    for parameter, name, shape in zip(model.get_parameters(), inputs, shapes, strict=True):
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
        parameter.set_partial_shape(openvino.PartialShape([one if isinstance(one, int) else -1 for one in shape]))
    model.validate_nodes_and_infer_types()
    for result, name in zip(model.get_results(), outputs, strict=True):
        result.set_friendly_name(name)
        result.output(0).set_names({name})


def _tell(model: Any, signature: Signature, path: Path) -> None:
    """Put the calling convention, and the checksum of the artifact beside the file, into the file."""
    told: Mapping[str, str] = {SIGNATURE: signature.to_json(), ARTIFACT: checksum_beside(path)}
    for key, text in told.items():
        model.set_rt_info(text, ["framework", key])


def _size(size: Any) -> int | str:
    return int(text) if (text := str(size)).isdecimal() else text


def _shape(output: Any) -> tuple[int | str, ...] | None:
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic:
        return None
    return tuple(size.get_length() if size.is_static else "?" for size in shape)


def write(graphs: Mapping[str, Any], path: Path, beside: Callable[[Path], object] = lambda _: None) -> int:
    """Write graphs under temporary names, then rename: a crash leaves none without its numbers.

    Args:
        graphs: an `openvino.Model` for each file name.
        path: that of one of them, which is there last.
        beside: writes more files into a directory.

    Returns:
        the bytes of the graph at `path` and its numbers.
    """
    import openvino

    with owned(path.parent, wait=SHORT_WAIT), writing_to(path.parent), temporary_folder(path.parent) as folder:
        for name, graph in graphs.items():
            openvino.save_model(graph, str(Path(folder) / name), compress_to_fp16=False)
        written = sum(file.stat().st_size for file in Path(folder).glob(f"{path.stem}.*"))
        beside(Path(folder))
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda one: (one.name == path.name, one.name)):
            place = path.parent / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)
    return written
