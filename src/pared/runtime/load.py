"""`pared.load`: a saved model, in PyTorch or in another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, overload

import torch
from torch import nn

from pared.artifact.envelope import find_artifact
from pared.artifact.shards import sharded_in
from pared.errors import ConfigError
from pared.files.disk import as_path
from pared.files.threads import apart
from pared.model import storage
from pared.model.checks import check_modules, check_nesting
from pared.model.copying.ties import check_globals
from pared.model.tensors import ModuleT, find_tensors, tensor_count
from pared.runtime import quantized
from pared.runtime.layers.table import check_registered
from pared.runtime.onnx.engines import SESSIONS, Engine, Runner, fastest, open_runner
from pared.runtime.placement import Memory
from pared.runtime.profile.profile import profile_beside
from pared.runtime.record import record_of
from pared.runtime.serving.served import warm_up
from pared.scalars import check_choice
from pared.switches import rare_collections
from pared.terminal import Stages


@overload
def load(
    path: str | Path,
    model: ModuleT,
    *,
    memory: Memory = "fast",
    dtype: torch.dtype | None = None,
    engine: Literal["torch"] = "torch",
    warm: bool = True,
    quiet: bool = False,
) -> ModuleT: ...


@overload
def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    memory: Memory = "fast",
    dtype: torch.dtype | None = None,
    engine: Engine = "torch",
    warm: bool = True,
    quiet: bool = False,
) -> nn.Module: ...


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    memory: Memory = "fast",
    dtype: torch.dtype | None = None,
    engine: Engine = "torch",
    warm: bool = True,
    quiet: bool = False,
) -> nn.Module:
    """Load a quantized model.

    On Linux this also changes the C allocator of the whole process: memory that is freed stays with the process for the
    next call, which makes int8 layers faster and the process's resident memory a little larger.

    A process may fork after this, as servers do that load a model before they start workers, as long as it has not
    called the model, or computed anything large with PyTorch, itself.

    Args:
        path: the directory that `save` wrote, or the artifact itself.
        model: the architecture: any instance of it, on the CPU or on the meta device. Its numbers are not used, and
            it is not changed. Only PyTorch needs it.
        memory: "small" keeps the bytes of the file, and decodes a weight whenever its layer reads it (of a table, only
            the rows that are looked up, and their neighbours): memory near the size of the file and of the largest
            weight as floats, at the cost of the milliseconds that `q_model.report()` shows; weights whose steps belong
            to groups of columns are floats even so. "fast" decodes once, and packs what runs in int8. Only for PyTorch.
        dtype: torch.bfloat16 runs a model in bfloat16 that was fitted in another type, in half of the memory or less:
            weights of linear layers on int8 grids stay codes, and are multiplied with inputs of bfloat16, which int8
            does not round; floats in the arguments have to be bfloat16, as for any such model. None: the type in which
            it was fitted. Only for PyTorch.
        engine: what runs the model. "onnxruntime" and "openvino" run the `model.onnx` that
            `q_model.export(directory, inputs)` wrote beside the artifact, with the same number of threads as PyTorch;
            "auto" times every installed engine, and PyTorch if `model` is given, on inputs like those of the export,
            and takes the fastest.
        warm: make the graphs that answer the model's calls now, which takes a second or two where calls were timed on
            a machine like this one. False leaves that to the first call of each kind. Only for PyTorch.
        quiet: True shows no progress. Otherwise it is shown at a terminal.

    Returns:
        the quantized model. `engine.json` beside the artifact decides which layers run in int8 if it was measured on a
        machine like this one; otherwise all run in int8 that the artifact allows. With another engine, a
        `pared.Runner`, which is called the same way; its `engine` names the engine, and `engine_ms` holds the
        milliseconds that "auto" measured.

    Raises:
        ConfigError: an option has no valid value, or `model` or the engine's package is missing.
        FileError: there is no artifact, or it cannot be read; or there is no export, or it is of another artifact.
        CorruptError, UnsafeError, VersionError: the artifact contradicts itself, would inflate without bound, or was
            written by a newer version.
        MismatchError: the artifact belongs to another architecture.
        ModelError: the engine cannot run the exported graph.
    """
    check_choice("pared.load", "memory", memory, get_args(Memory))
    check_choice("pared.load", "engine", engine, get_args(Engine))
    if dtype not in (None, torch.bfloat16):
        what = f"dtype={dtype!r} is not None or torch.bfloat16, in which weights in codes are multiplied"
        raise ConfigError(what, where="pared.load", remedy="Call .to(dtype) of the model that pared.load returns.")
    if engine != "torch" and dtype is not None:
        what = f"dtype={dtype} and engine={engine!r} exclude each other"
        raise ConfigError(what, where="pared.load", remedy="Leave one out: an export has its type.")
    if engine in SESSIONS:
        if memory == "small":
            what = f'memory="small" and engine={engine!r} exclude each other'
            raise ConfigError(what, where="pared.load", remedy="Leave one out: only PyTorch decodes weights late.")
        return open_runner(path, engine)
    loaded = None
    if engine == "torch" or model is not None:
        loaded = _in_torch(path, model, memory, dtype, warm, Stages(quiet=quiet))
    if engine == "torch":
        assert loaded is not None
        return loaded
    chosen, times = fastest(loaded, path)
    (chosen if isinstance(chosen, Runner) else record_of(chosen)).engine_ms = times
    return chosen


def check_model(model: nn.Module | None, where: str) -> nn.Module:
    """Refuse anything that is not a module, with an error that says how to pass the architecture."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model is missing" if model is None else f"model is a {type(model).__name__}, not a torch.nn.Module",
            where=where,
            remedy=f"Pass an instance of the architecture: {where}(directory, model=build_model()).",
        )
    check_nesting(model)
    check_modules(model)
    check_globals(model)
    check_registered(model)
    return model


def _in_torch(
    path: str | Path,
    model: nn.Module | None,
    memory: Memory,
    dtype: torch.dtype | None,
    warm: bool,
    stages: Stages,
) -> nn.Module:
    known = check_model(model, "pared.load")
    place = as_path(path, "load")
    return opened(sharded_in(place) or find_artifact(place), known, memory, dtype, warm=warm, stages=stages)


def opened(
    file: Path,
    known: nn.Module,
    memory: Memory = "fast",
    dtype: torch.dtype | None = None,
    *,
    warm: bool = True,
    stages: Stages,
    into: nn.Module | None = None,
) -> nn.Module:
    """The quantized model of an artifact, as `load` gives it.

    Args:
        file: the artifact, or the index of its shards.
        known: the architecture, checked.
        memory: as for `load`.
        dtype: as for `load`.
        warm: as for `load`.
        stages: shows progress.
        into: an object of the architecture's class that becomes the quantized model; None: a new one.

    Raises:
        CorruptError, FileError, MismatchError, UnsafeError, VersionError: see `load`.
    """

    def made() -> nn.Module:
        tensors = find_tensors(known)
        contents = storage.read(file, tensors.numbers, undecoded=memory == "small")
        loaded = quantized.assemble(tensors, contents, profile_beside(file), memory, into=into, dtype=dtype)
        if warm:
            with stages.stage("making graphs"):
                warm_up(loaded)
        return loaded

    with rare_collections(tensor_count(known)):
        return apart(made)
