"""`pared.load`: a saved model, in PyTorch or in another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, overload

from torch import nn

from pared.artifact.envelope import find_artifact
from pared.errors import ConfigError
from pared.files.disk import as_path
from pared.model import storage
from pared.model.checks import check_modules
from pared.model.tensors import ModuleT, find_tensors
from pared.runtime import quantized
from pared.runtime.layers.table import check_registered
from pared.runtime.onnx.engines import SESSIONS, Engine, Runner, fastest, open_runner
from pared.runtime.placement import Memory
from pared.runtime.profile import profile_beside
from pared.runtime.record import record_of
from pared.scalars import check_choice


@overload
def load(
    path: str | Path, model: ModuleT, *, memory: Memory = "fast", engine: Literal["torch"] = "torch"
) -> ModuleT: ...


@overload
def load(
    path: str | Path, model: nn.Module | None = None, *, memory: Memory = "fast", engine: Engine = "torch"
) -> nn.Module: ...


def load(
    path: str | Path, model: nn.Module | None = None, *, memory: Memory = "fast", engine: Engine = "torch"
) -> nn.Module:
    """Load a quantized model.

    Args:
        path: the directory that `save` wrote, or the artifact itself.
        model: the architecture: any instance of it, on the CPU or on the meta device. Its numbers are not used, and
            it is left as it is. Only PyTorch needs it.
        memory: "small" keeps every weight in codes and decodes it whenever it is read (of a table, only the rows that
            are asked for): a third of the memory of float weights at most, for the milliseconds that
            `q_model.report()` tells. "fast" decodes once, and packs what runs in int8. Only for PyTorch.
        engine: what runs it. "onnxruntime" and "openvino" run the `model.onnx` that `q_model.export(directory, inputs)`
            wrote beside the artifact, with as many threads as PyTorch has; "auto" times what is installed, PyTorch too
            if there is a `model`, on inputs like those of the export, and takes the fastest.

    Returns:
        the quantized model. Which layers run in int8 is taken from `engine.json` beside the artifact if that was
        measured on an equal machine; else all that the artifact allows. With another engine, a
        `pared.Runner`, which is called alike. Its `engine` names the engine, `engine_ms` what "auto" measured.

    Raises:
        ConfigError: an option is none that there is, `model` is missing, or the engine's package is.
        FileError: there is no artifact there, or it cannot be read; or no export, or one of another artifact.
        CorruptError, UnsafeError, VersionError: its bytes contradict themselves, would inflate without bound, or were
            written by a newer version.
        MismatchError: it belongs to another architecture.
        ModelError: the engine cannot run the exported graph.
    """
    check_choice("pared.load", "memory", memory, get_args(Memory))
    check_choice("pared.load", "engine", engine, get_args(Engine))
    if engine in SESSIONS:
        if memory == "small":
            what = f'memory="small" and engine={engine!r} exclude each other'
            raise ConfigError(what, where="pared.load", remedy="Leave out one: only PyTorch holds weights in codes.")
        return open_runner(path, engine)
    loaded = _in_torch(path, model, memory) if engine == "torch" or model is not None else None
    if engine == "torch":
        assert loaded is not None
        return loaded
    found, times = fastest(loaded, path)
    if isinstance(found, Runner):
        found.engine_ms = times
    else:
        record_of(found).engine_ms = times
    return found


def check_model(model: nn.Module | None, where: str) -> nn.Module:
    """Refuse a missing architecture, and anything that is not a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}",
            where=where,
            remedy=f"Pass an instance of the architecture: {where}(directory, model=build_model()).",
        )
    check_modules(model)
    check_registered(model)
    return model


def _in_torch(path: str | Path, model: nn.Module | None, memory: Memory) -> nn.Module:
    model = check_model(model, "pared.load")
    file = find_artifact(as_path(path, "load"))
    contents = storage.read(file)
    return quantized.assemble(find_tensors(model), contents, profile_beside(file), memory)
