"""The quantized model: a copy of the user's model, of a subclass of its own class, whose state is codes.

Weights that run in int8 live in counterparts (`runtime.layers`). All others stay ordinary float parameters of the
original modules; hooks let `state_dict` return their codes, recovered exactly as `round(weight / step)`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import pared
from pared.artifact.outcome import Outcome
from pared.errors import MismatchError, ModelError
from pared.inspection import ledger
from pared.inspection.page import page
from pared.inspection.page.drawing import require_library
from pared.model import storage
from pared.model.checks import check_unquantized
from pared.model.contents import Contents, Stored, completed, match
from pared.model.copies import clone_structure, refresh_recurrent
from pared.model.tensors import ModelTensors, ModuleT, find_tensors, loose_tensors, named_tensors, registered
from pared.runtime import summary
from pared.runtime.kernels.machine import keep_freed_memory
from pared.runtime.layers.attention import leave_fast_paths, rejoin_fast_paths
from pared.runtime.layers.counterpart import Counterpart, restore
from pared.runtime.onnx.capture import Dynamic
from pared.runtime.onnx.export import Exported, export_onnx
from pared.runtime.placement import Memory, detach, held_in_codes, install, running_of
from pared.runtime.profile import ENGINE_FILE, ModelTiming, Profile
from pared.runtime.record import RECORD, Record, curve_of, record_of, set_outcome, state_from_json
from pared.runtime.result import Offered, Result, Yielding, refuse_save_pretrained
from pared.runtime.serving.bfloat16 import BFloat16Server
from pared.runtime.serving.served import release, serve
from pared.runtime.serving.server import Server

log = logging.getLogger(__name__)

DEPLOY: Final = "deploy.yaml"


class Quantized(Yielding):
    """Mixed in before the model's own class, which is served: how a quantized model is pickled."""

    def _pared_artifact(self) -> bytes:
        """The artifact that `save` would write, for whatever reads a model as it reads a file."""
        return storage.to_bytes(contents_of(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as an empty model of the original class, the bytes of the artifact, and plain text.

        No module inside of `pared` is named, so that files outlive its layout.

        Protocol 2, which torch.save uses, spends three bytes on two of a bytes object: there they travel as a tensor.
        """
        record = record_of(self)
        data: bytes | Tensor = self._pared_artifact()
        if int(protocol) < 3:
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return pared._revive, (skeleton_of(self), data, record.to_json())


def revive(skeleton: nn.Module, data: bytes | Tensor, state: str) -> nn.Module:
    """The quantized model of a pickle: the inverse of `Quantized.__reduce_ex__`."""
    raw = data.numpy().tobytes() if isinstance(data, Tensor) else data
    profile, outcome, memory = state_from_json(state)
    model = assemble(find_tensors(skeleton), storage.from_bytes(raw), profile, memory)
    set_outcome(model, outcome)
    return model


def save(model: nn.Module, directory: str | Path, *, container: str = "pt", verify: bool = True) -> Path:
    """Write a quantized model to a directory: the artifact, `deploy.yaml` for people, `engine.json` for this machine.

    Args:
        model: made by `fit` or `load`.
        directory: made if it is missing; files of an earlier save are replaced, each atomically.
        container: "pt" (`best_model.pt`) or "safetensors" (`best_model.safetensors`).
        verify: read the artifact back and compare every number.

    Returns:
        the artifact's path.

    Raises:
        FileError: the directory cannot be written.
        ModelError: the model's weights were changed after compression, or it is no quantized model.
    """
    record = record_of(model)
    contents = contents_of(model)
    path = storage.write(contents, directory, kind=container, verify=verify)
    deploy = summary.deploy_yaml(ledger.inspect(path), contents, record.outcome, record.running)
    storage.write_beside(path, DEPLOY, deploy)
    storage.write_beside(path, ENGINE_FILE, record.profile.to_json())
    return path


def export(model: nn.Module, path: str | Path, inputs: Any, *, dynamic: Dynamic = True) -> Exported:
    """Write a quantized model as ONNX: integer codes and their steps, standard operators, no class of its own needed.

    Weights are int8 (or int16) initializers with a `DequantizeLinear`; a layer that runs in static int8 also has its
    input on the calibrated grid, as `QuantizeLinear` and `DequantizeLinear`; all others have integer weights only.
    Which layers these are is taken from the artifact, not from what is fastest on this machine.

    Args:
        model: made by `fit` or `load`.
        path: of the file, `model.onnx` for instance; or a directory, where `pared.load(..., engine="onnxruntime")` and
            `engine="openvino"` find it beside the artifact: save first, then export.
        inputs: one batch, as in `calib_dataloader`: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Arguments that are no tensors are fixed to their values.
        dynamic: which dimensions of the inputs may vary. True: all that the model allows; False: none; or, by
            argument, what `torch.export.export` takes as `dynamic_shapes`.

    Raises:
        ModelError: torch.export cannot capture the float model, or it is no quantized model.
        ConfigError: the packages are not installed: pip install 'pared[onnx]'.
        CalibrationError: the inputs do not fit the model's forward.
        FileError: the file cannot be written.
    """
    contents = contents_of(model)
    return export_onnx(decoded(find_tensors(skeleton_of(model)), contents), contents, path, inputs, dynamic)


def decoded(tensors: ModelTensors[ModuleT], contents: Contents) -> ModuleT:
    """A float model of the same architecture, in eval mode, with the numbers that the contents stand for."""
    numbers: dict[int, Tensor] = {}
    for stored, objects in match(tensors, contents):  # one object for all that are tied
        numbers |= dict.fromkeys(map(id, objects), _like(stored.coded.decode(), objects[0]))
    return clone_structure(tensors.model, numbers).eval()


def nbytes(model: nn.Module) -> int:
    """The size in bytes of the `best_model.pt` that `save` writes."""
    return _result_of(model).nbytes()


def report(model: nn.Module, *, html: str | Path | None = None) -> str:
    """What each tensor became, its bytes and why.

    Args:
        model: made by `fit` or `load`.
        html: also write it as a page for a browser, with pictures, to this file: one file that fetches nothing.

    Returns:
        the report as text of 100 columns.

    Raises:
        ConfigError: `html`, and the drawing libraries are not installed: `pip install 'pared[report]'`.
        FileError: the page cannot be written.
        ModelError: the model's weights were changed after compression, or it is no quantized model.
    """
    record = record_of(model)
    if html is not None:
        require_library()
    contents = contents_of(model)
    found = ledger.of_artifact_bytes(storage.to_bytes(contents), where=type(model).__name__)
    if html is not None:
        data = summary.page_data(found, contents, record.outcome, record.running, record.profile, record.curve)
        page.write(data, html)
    small = record.memory == "small"
    notes = (
        [f"weights stay in codes; decoding all of them takes {_decoding_ms(model):.1f} ms"]
        if small
        else record.profile.summary()
    )
    return summary.report(found, contents, record.outcome, record.running, notes)


def _decoding_ms(model: nn.Module) -> float:
    """The best of three."""
    held = [(module, a) for module in model.modules() if isinstance(module, Counterpart) for a in module.pared_views]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for module, attribute in held:
            module.pared_decode(attribute)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def _result_of(model: nn.Module) -> Result:
    """What came of compressing the model: met, score, baseline, trials, plan, curve, size and engine."""
    return Result(model, contents_of)


# What a quantized model offers beside what its own class has. A model that has one of these names, or whose forward
# assigns to it, keeps its own; the functions of `pared` work for every model. All but the first four are older names
# of what stands in `q.pared`.
_OFFERED: Final[Mapping[str, tuple[Callable[..., Any], bool]]] = {
    "save": (save, True),
    "export": (export, True),
    "report": (report, True),
    "pared": (_result_of, False),
    "nbytes": (nbytes, False),
    "curve": (curve_of, True),
    **{
        name: (lambda model, name=name: getattr(_result_of(model), name), False)
        for name in ("met", "score", "baseline", "trials", "plan", "engine", "engine_ms")
    },
}


def plan_of(model: nn.Module) -> tuple[summary.TensorSummary, ...]:
    """What each tensor became: one line per tensor, in the model's order."""
    return _result_of(model).plan


_CLASSES: Final[dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]]] = {}


def _quantized_class(base: type[nn.Module], offered: frozenset[str]) -> type[nn.Module]:
    if (base, offered) not in _CLASSES:
        names: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        for name in sorted(offered):
            function, is_method = _OFFERED[name]
            names[name] = Offered(function, is_method=is_method)
        if hasattr(base, "save_pretrained"):
            names["save_pretrained"] = refuse_save_pretrained
        _CLASSES.setdefault((base, offered), type(base.__name__, (Quantized, base), names))
    return _CLASSES[base, offered]


def assemble(tensors: ModelTensors[ModuleT], contents: Contents, profile: Profile, memory: Memory = "fast") -> ModuleT:
    """Make the quantized model from a float model or an empty skeleton, and contents that fit it.

    Args:
        tensors: of the model that gives structure and class; it is left as it is, and its numbers are not used.
        contents: every tensor.
        profile: which layers run in int8 here.
        memory: "small": every weight stays in codes, and is decoded whenever it is read.

    Raises:
        MismatchError: the contents do not fit the model, or the model holds a meta tensor that is in no state.
    """
    model = tensors.model
    check_unquantized(model)
    contents = completed(tensors, contents)
    pairs = match(tensors, contents)
    running = running_of(model, contents, profile, memory)
    in_codes = held_in_codes(model, pairs, contents, running, memory)
    replacement: dict[int, Tensor] = {}
    for stored, objects in pairs:
        if stored.name in in_codes:
            new = torch.empty(stored.coded.shape, dtype=stored.coded.dtype, device="meta")
        else:
            new = stored.coded.decode()
        replacement |= {id(tensor): _like(new, tensor) for tensor in objects}
    clone = clone_structure(model, replacement).eval()
    stored_forms = install(clone, contents, in_codes, running)
    if in_codes:
        keep_freed_memory()
        leave_fast_paths(clone)
    _refuse_meta(clone)
    known = tuple((stored.names, stored.kind, stored.decision) for stored in contents.tensors)
    provenance = dict(contents.provenance)
    outcome = Outcome.from_json(provenance.pop("outcome", {}))
    record = Record(known, stored_forms, dict(contents.activations), provenance, profile, running, memory, outcome)
    offered = frozenset(name for name in _OFFERED if not hasattr(clone, name))
    _serve(clone, profile, memory)
    clone.__class__ = _quantized_class(type(clone), offered)  # type: ignore[assignment]  # a subclass
    clone.__dict__[RECORD] = record
    return clone


def _serve(model: nn.Module, profile: Profile, memory: Memory) -> None:
    """Let something faster than modules answer the calls of the model and its submodels, where that was measured."""
    modules = dict(model.named_modules())
    submodels = {} if memory == "small" or profile.model.kernel == "float32" else profile.submodels
    for name, timing in submodels.items():
        if name in modules and timing.is_served:
            serve(modules[name], _server(timing))
    serve(model, Server(outline_of) if memory == "small" else _server(profile.model))


def _server(timing: ModelTiming) -> Server:
    if timing.kernel == "float32":
        return Server(outline_of)
    return (
        BFloat16Server(floats_of, timing.largest_calls)
        if timing.kernel == "bfloat16"
        else Server(outline_of, timing.graphs)
    )


def _like(new: Tensor, tensor: Tensor) -> Tensor:
    """A parameter where the skeleton has one, laid out as that is, and frozen: codes cannot follow training."""
    if new.stride() != tensor.stride() and 0 not in tensor.stride() and not new.is_meta:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=new.dtype).copy_(new)
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _refuse_meta(model: nn.Module) -> None:
    left = [name for name, tensor in named_tensors(model) if tensor.is_meta]
    left += [attribute for _, attribute, tensor in loose_tensors(model) if tensor.is_meta]
    if left:
        raise MismatchError(
            "is on the meta device and in no state dict, so the artifact does not hold it",
            where=left[0],
            remedy="Register it as a buffer, or build the skeleton on the CPU.",
        )


def contents_of(model: nn.Module) -> Contents:
    """Everything that the artifact of a quantized model holds.

    Raises:
        ModelError: a weight was changed after compression.
    """
    record = record_of(model)
    _refuse_edited(model, record)
    tensors = []
    for names, kind, decision in record.tensors:
        module_name, _, attribute = names[0].rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, Counterpart) and attribute in module.pared_views:
            coded = module.pared_coded(attribute)
        else:
            coded = record.stored_forms[names[0]].coded(names[0], dict(registered(module))[attribute])
        tensors.append(Stored(names, kind, coded, decision))
    provenance = {**record.provenance, "outcome": record.outcome.to_json()}
    return Contents(tuple(tensors), record.activations, provenance)


def _refuse_edited(model: nn.Module, record: Record) -> None:
    """Refuse a model whose layers were added, taken away or exchanged: its record does not describe it any more."""
    known = {name for names, _, _ in record.tensors for name in names}
    codes = {
        f"{name}.{attribute}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Counterpart)
        for attribute in module.pared_views
    }
    found = {name for name, _ in named_tensors(model) if not name.rpartition(".")[2].startswith("pared_")}
    changed = sorted(known ^ (found | {name.removeprefix(".") for name in codes}))
    if changed:
        raise ModelError(
            "was added to the model, or taken out of it, after it was compressed",
            where=changed[0],
            remedy="Change the float model, and compress it again with pared.fit.",
        )


def skeleton_of(model: nn.Module) -> nn.Module:
    """An empty float model of the original class, on the meta device."""
    return _float_form(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def outline_of(model: nn.Module) -> nn.Module:
    """A float model of the original class with the same tensors; those held in codes are on the meta device."""
    return _float_form(model, lambda tensor: tensor)


def floats_of(model: nn.Module) -> nn.Module:
    """A float model of the original class with the numbers that its codes stand for; the other tensors are the same."""
    found = outline_of(model)
    known: dict[int, nn.Parameter] = {}  # what is tied stays so
    for name, own in model.named_modules():
        for attribute in own.pared_views if isinstance(own, Counterpart) else ():
            codes = id(own.pared_codes(attribute))
            if codes not in known:
                known[codes] = nn.Parameter(own.pared_decode(attribute), requires_grad=False)
            found.get_submodule(name)._parameters[attribute] = known[codes]
    refresh_recurrent(found)
    return found


def _float_form(model: nn.Module, content: Callable[[Tensor], Tensor]) -> nn.Module:
    """The form of a quantized model, or of a part of one."""
    found = clone_structure(model, content)
    found.__dict__.pop(RECORD, None)
    for module in found.modules():
        release(module)
        detach(module)
        if isinstance(module, Counterpart):
            restore(module)
    rejoin_fast_paths(found)
    return found
