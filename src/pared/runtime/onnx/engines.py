"""Runtimes other than PyTorch: an exported model in ONNX Runtime or OpenVINO, called like the original model."""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from pared.errors import ConfigError, CorruptError, FileError, ModelError, ParedError
from pared.files.disk import as_path, reading
from pared.runtime.kernels.machine import exact_products
from pared.runtime.kernels.onnxruntime.session import unreported
from pared.runtime.onnx.export import ARTIFACT, ONNX_FILE, checksum_beside, need
from pared.runtime.onnx.signature import SIGNATURE, Signature
from pared.runtime.stopwatch import fastest_ms
from pared.switches import end_idle_threads

log = logging.getLogger(__name__)

# Without it, sums of two products saturate at 16 bits on x86 processors without VNNI. It makes weights unsigned.
EXACT_PRODUCTS: Final = "session.x64quantprecision"

Engine = Literal["torch", "onnxruntime", "openvino", "auto"]


class _OnnxRuntime:
    """A graph loaded in ONNX Runtime; several threads may run it at once."""

    def __init__(self, path: Path, threads: int) -> None:
        runtime = need("onnxruntime", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        if not exact_products():
            options.add_session_config_entry(EXACT_PRODUCTS, "1")
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def metadata(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.detach().cpu().resolve_neg().numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(array) for array in self._session.run(None, arrays)]


class OpenVinoSession:
    """A model compiled by OpenVINO; several threads may run it at once.

    Args:
        model: an `openvino.Model`; or what `compiled` gave, for the same number of threads.
        threads: how many one run may take.
        more: options of OpenVINO; default: none.

    Raises:
        ModelError: OpenVINO compiled something before this process was forked. What was compiled there still runs, but
            to compile again would end the process: the threads that it waits for are gone.
    """

    _process: ClassVar[int | None] = None  # the first that compiled

    def __init__(self, model: Any, threads: int, more: Mapping[str, object] = MappingProxyType({})) -> None:
        process = OpenVinoSession._process or os.getpid()
        if process != os.getpid():
            raise ModelError(
                "OpenVINO was in use before this process was forked, so it cannot compile a graph here",
                where="graph",
                remedy="Load the model, and call it with each number of threads, before the fork; or start processes.",
            )
        OpenVinoSession._process = process
        # In float32, like the other engines: its default is bfloat16 on processors that have it.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            **more,
        }
        openvino = need("openvino", "openvino")
        core = openvino.Core()
        if isinstance(model, bytes):
            self._compiled = core.import_model(io.BytesIO(model), "CPU", options)
        else:
            self._compiled = core.compile_model(model, "CPU", options)
        self._tensor = openvino.Tensor
        # By each input's name its place and its type.
        self._inputs: dict[str, tuple[int, object]] = {
            name: (place, port.element_type.to_dtype())
            for place, port in enumerate(self._compiled.inputs)
            for name in port.names
        }
        self._requests: list[Any] = []  # those that no thread is using: each serves one at a time
        _ALIVE.add(self)

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs, which belong to the caller, for inputs on the CPU by their names."""
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        results = self._answer(request, inputs)
        self._requests.append(request)
        return results

    def _answer(self, request: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.detach().cpu().contiguous().resolve_neg().numpy() for name, tensor in inputs.items()}
        end_idle_threads()
        if all(array.ndim and array.dtype == self._inputs[name][1] for name, array in arrays.items()):
            # What `infer` does with them in the end; on its way there it takes as long as a small model runs.
            for name, array in arrays.items():
                request.set_input_tensor(self._inputs[name][0], self._tensor(array, shared_memory=True))
            found = request.infer()
        else:
            found = request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(array) for array in found.values()]

    def known(self, _inputs: Mapping[str, Tensor]) -> frozenset[str]:
        """Which of these tensors it gave itself, and knows to be finite."""
        return frozenset()

    def kinds(self) -> list[str]:
        """The kinds of the operators that were made of the model."""
        return [node.get_rt_info()["layerType"].astype(str) for node in self._compiled.get_runtime_model().get_ops()]

    def _idle(self) -> list[Any]:
        """The requests that no thread is using."""
        return self._requests

    def compiled(self) -> bytes:
        """What was compiled, for this version of OpenVINO on this machine."""
        found: bytes = self._compiled.export_model().getvalue()
        return found

    def _stay(self) -> None:
        """Never be freed."""
        for one in (self._compiled, *self._idle()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


_ALIVE: Final[weakref.WeakSet[OpenVinoSession]] = weakref.WeakSet()


def _after_fork() -> None:
    """Keep what OpenVINO compiled in the parent: it runs here, but to free it would wait for threads that are gone."""
    for session in list(_ALIVE):
        session._stay()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _OpenVino(OpenVinoSession):
    """A file loaded in OpenVINO."""

    def __init__(self, path: Path, threads: int) -> None:
        model = need("openvino", "openvino").Core().read_model(str(path))
        super().__init__(model, threads)
        self._metadata = {
            key: str(model.get_rt_info(["framework", key]).astype(str))
            for key in (SIGNATURE, ARTIFACT)
            if model.has_rt_info(["framework", key])
        }

    def metadata(self) -> Mapping[str, str]:
        return self._metadata


_Session = _OnnxRuntime | _OpenVino
SESSIONS: Final[Mapping[str, type[_Session]]] = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}


class Runner(nn.Module):
    """An exported model in another runtime, without its Python class; `pared.load(..., engine=...)` makes it.

    It is called like the model, on the CPU, with the arguments that it was exported with, and returns outputs of the
    same structure; an output class with named fields becomes `Outputs`. It has no parameters.

    Attributes:
        engine: "onnxruntime" or "openvino".
        engine_ms: the measured milliseconds of each engine if `engine="auto"` chose this one, else empty.
        signature: the calling convention: arguments, inputs and outputs.
    """

    def __init__(self, path: Path, engine: str) -> None:
        super().__init__()
        self.engine, self.path = engine, path
        self.engine_ms: Mapping[str, float] = {}
        self._session = _opened(path, engine)
        self.signature = _signature(self._session.metadata(), path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            ConfigError: the inputs do not fit the export.
        """
        inputs = self.signature.bind(args, kwargs, str(self.path.name))
        try:
            outputs = self._session.run(inputs)
        except RuntimeError as error:
            raise _unfit(self, error) from error
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                raise _unfit(self, error) from error
            raise
        if len(outputs) != self.signature.n_outputs:
            raise CorruptError(
                f"gives {len(outputs)} outputs, and says that it gives {self.signature.n_outputs}",
                where=self.path.name,
                remedy="Export the model again: q_model.export(directory, inputs).",
            )
        return self.signature.rebuild(outputs)


def _unfit(runner: Runner, error: Exception) -> ConfigError:
    return ConfigError(
        f"{runner.engine} cannot run it on these inputs: {error}",
        where=runner.path.name,
        remedy="Check the inputs' shapes: they must fit each other, and the export may have fixed some dimensions.",
    )


def _opened(path: Path, engine: str) -> _Session:
    with unreported():
        need(engine, engine)
    with reading(path):
        exported = path.is_file()
    if not exported:
        raise FileError(
            "is missing: the model has not been exported",
            where=str(path),
            remedy="Export it to the artifact's directory: q_model.export(directory, inputs).",
        )
    try:
        return SESSIONS[engine](path, torch.get_num_threads())
    except Exception as error:
        raise ModelError(
            f"{engine} cannot load it: {error}",
            where=str(path),
            remedy='Use another engine: engine="torch" runs every model.',
        ) from error


def _signature(metadata: Mapping[str, str], path: Path) -> Signature:
    try:
        found = Signature.from_json(metadata[SIGNATURE], path.name)
        found.check(path.name)
        return found
    except (CorruptError, KeyError) as error:
        because = error.what if isinstance(error, CorruptError) else "it has none"
        raise CorruptError(
            f"has no valid description of its inputs and outputs: {because}",
            where=str(path),
            remedy="pared did not write this file. Export the model again: q_model.export(directory, inputs).",
        ) from error


def open_runner(directory: str | Path, engine: str) -> Runner:
    """The exported model of a directory, in a runtime.

    Raises:
        ConfigError: the runtime's package is not installed.
        FileError: there is no export, or it was made from another artifact than the one beside it.
        ModelError: the runtime cannot run the graph.
    """
    path = as_path(directory, "load")
    if path.suffix != ".onnx":
        path = (path if path.is_dir() else path.parent) / ONNX_FILE
    runner = Runner(path, engine)
    recorded = runner._session.metadata().get(ARTIFACT, "")
    if recorded and recorded != checksum_beside(path):
        raise FileError(
            "was exported from another artifact than the one that is beside it now",
            where=str(path),
            remedy="Export the model again: q_model.export(directory, inputs).",
        )
    return runner


def fastest(model: nn.Module | None, directory: str | Path) -> tuple[nn.Module, Mapping[str, float]]:
    """The fastest of: a quantized model in PyTorch, and its export in each runtime that is installed.

    They are timed in turn on inputs like those of the export.

    Args:
        model: the model in PyTorch, or None.
        directory: the directory with the export.

    Returns:
        the model or a `Runner`; and the milliseconds of each engine's fastest run.

    Raises:
        ParedError: no engine can run it.
    """
    found: dict[str, nn.Module] = {} if model is None else {"torch": model}
    opened = {engine: _tried(directory, engine) for engine in SESSIONS}
    found |= {engine: runner for engine, runner in opened.items() if isinstance(runner, Runner)}
    if not found:
        raise next(error for error in opened.values() if isinstance(error, ParedError))
    runners = [one for one in found.values() if isinstance(one, Runner)]
    if not runners:
        return found["torch"], {}
    args, kwargs = runners[0].signature.sample()
    runs = {name: functools.partial(engine, *args, **kwargs) for name, engine in found.items()}
    times = fastest_ms(runs, in_a_row=True)
    best = min(times, key=times.__getitem__)
    log.info("the fastest engine is %s: %s", best, ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    return found[best], times


def _tried(directory: str | Path, engine: str) -> Runner | ParedError:
    """The runner, or why there is none."""
    try:
        return open_runner(directory, engine)
    except ParedError as error:
        log.info("%s is not tried: %s", engine, error)
        return error
