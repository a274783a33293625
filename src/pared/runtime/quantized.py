"""The quantized model: a copy of the user's model, of a subclass of its class, whose state dict holds codes.

Weights that run in int8 live in counterparts (`runtime.layers`). All others stay ordinary float parameters of the
original modules; hooks let `state_dict` return their codes, recovered exactly as `round(weight / step)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

import pared
from pared.artifact.outcome import Outcome
from pared.errors import MismatchError
from pared.files.disk import as_path
from pared.files.threads import apart
from pared.formats.coded import Grouped
from pared.inspection import ledger
from pared.inspection.page import page
from pared.inspection.page.drawing import require_library
from pared.model import storage
from pared.model.checks import check_unquantized
from pared.model.contents import Contents, completed, in_type, match
from pared.model.copies import clone_structure
from pared.model.copying.reach import Reach
from pared.model.state import extra
from pared.model.tensors import ModelTensors, ModuleT, find_tensors, named_tensors
from pared.runtime import summary
from pared.runtime.exporting.exporters import EXPORTERS, Job
from pared.runtime.float_forms import floats_of, like, outline_of, skeleton_of
from pared.runtime.graphs.capturing import kept
from pared.runtime.kernels.machine import keep_freed_memory
from pared.runtime.layers.attention import leave_fast_paths
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.layers.subclasses import subclass_of
from pared.runtime.onnx.capture import Dynamic
from pared.runtime.onnx.export import Exported
from pared.runtime.pickling.parametrized import let_be_pickled
from pared.runtime.pickling.refusal import check_picklable
from pared.runtime.placement import Memory, held_in_codes, install, running_of
from pared.runtime.profile.profile import Profile
from pared.runtime.profile.timings import Form, ModelTiming
from pared.runtime.record import RECORD, Record, Result, contents_of, curve_of, record_of, set_outcome, state_from_json
from pared.runtime.saving import is_pretrained, refuse_save_pretrained, save, save_pretrained
from pared.runtime.serving.float_copy import FloatServer
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.offered import Offered, Yielding, free_names
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import serve
from pared.runtime.serving.server import Capture, FirstOf, KindServer, Server
from pared.runtime.serving.settling import SettlingServer
from pared.runtime.stopwatch import fastest_ms
from pared.targets.table import check_other

log = logging.getLogger(__name__)


class Quantized(Yielding):
    """The base class, before the model's own, that says how a quantized model is pickled."""

    def _pared_artifact(self) -> bytes:
        """The artifact that `save` would write, for readers that take a model like a file."""
        return storage.to_bytes(contents_of(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as an empty model of the original class, the bytes of the artifact, and a text.

        No module inside `pared` is named, so that old files can be read whatever the package's layout becomes.

        In protocol 2, which torch.save uses, every byte of a bytes object takes up to two bytes: there it is a tensor.
        """
        structure = let_be_pickled(skeleton_of(self))
        check_picklable(structure)
        data: bytes | Tensor = self._pared_artifact()
        if int(protocol) < 3:
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return pared._revive, (structure, data, record_of(self).to_json())


def revive(skeleton: nn.Module, data: bytes | Tensor, state: str) -> nn.Module:
    """The quantized model of a pickle: the inverse of `Quantized.__reduce_ex__`."""
    raw = data.numpy().tobytes() if isinstance(data, Tensor) else data
    profile, outcome, memory, dtype = state_from_json(state)

    def made() -> nn.Module:
        contents = storage.from_bytes(raw, undecoded=memory == "small")
        return assemble(find_tensors(skeleton), contents, profile, memory, dtype=dtype)

    model = apart(made)
    set_outcome(model, outcome)
    return model


def export(
    model: nn.Module,
    path: str | Path,
    inputs: Any = None,
    *,
    to: str = "onnx",
    folder: str | Path | None = None,
    dynamic: Dynamic = True,
) -> Exported:
    """Write a quantized model for another runtime: by default as ONNX, integer codes and their steps.

    Other targets take what was fitted for them (`PostTrainingQuantConfig(target=...)`), code by code. They take weights
    with a step for each row where these are exactly representable; nothing is rounded a second time.

    In ONNX weights are int8 (or int16) initializers with a `DequantizeLinear`; a layer that runs in static int8 also
    has its input on the calibrated grid, as `QuantizeLinear` and `DequantizeLinear`; all others have integer weights
    only. The artifact decides which layers these are, not what is fastest on this machine.

    Args:
        model: a model that `fit` or `load` returned.
        path: the file to write, `model.onnx` for instance; or a directory, where `pared.load` with
            `engine="onnxruntime"` or "openvino" finds it beside the artifact: save first, then export. For OpenVINO,
            `model.xml`, with the numbers in `model.bin` beside it.
        inputs: one batch, as in `calib_dataloader`: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Arguments that are not tensors keep their values in the file. Only targets that hold a graph need it; for
            OpenVINO, a language model of transformers is written without: with its cache inside, for openvino-genai.
        to: the runtime: "onnx", "openvino", "gguf", "compressed-tensors", "gptq", "mlx", ...
        folder: the Hugging Face folder that the model came from, with config.json and the tokenizer, which runtimes
            that know architectures read from their files. Default: the model's own configuration, and no tokenizer.
        dynamic: which dimensions of the inputs may vary. True: all that `torch.export` leaves free; False: none; or, by
            argument, what `torch.export.export` takes as `dynamic_shapes`. A warning names what is fixed although the
            model takes other sizes, such as the length of the sequences of an LSTM.

    Returns:
        what was written: path, bytes, inputs, outputs, and which tensors are codes.

    Raises:
        ModelError: torch.export cannot capture the float model, or the model is not a quantized one.
        ConfigError: the target is not known, its packages are not installed (pip install 'pared[onnx]'), or it does
            not know the architecture, or cannot hold a tensor exactly.
        CalibrationError: the inputs do not fit the model's forward.
        FileError: the file cannot be written.
    """
    contents = contents_of(model)
    check_other("pared.export", to, "Call pared.save(model, directory)")
    place = None if folder is None else as_path(folder, "export")
    return EXPORTERS[to](Job(model, contents, path, inputs, place, dynamic))


def nbytes(model: nn.Module) -> int:
    """The size in bytes of the `best_model.pt` that `save` writes; the whole model is entropy-coded to find out."""
    return Result(model).nbytes()


def report(model: nn.Module, *, html: str | Path | None = None) -> str:
    """Report what each tensor became, its bytes and why.

    Args:
        model: a model that `fit` or `load` returned.
        html: also write the report, with pictures, to this HTML file, which loads nothing from elsewhere.

    Returns:
        the report as text, 100 columns wide.

    Raises:
        ConfigError: `html` is given, and the drawing libraries are not installed: `pip install 'pared[report]'`.
        FileError: the page cannot be written.
        ModelError: the model is not a quantized one, or its weights were changed after compression.
    """
    record = record_of(model)
    if html is not None:
        require_library()
    contents, outcome = contents_of(model), record.outcome_here
    made = storage.encoded(contents)
    listing = ledger.of_records(replace(made.records, where=type(model).__name__), made.index)
    if html is not None:
        data = summary.page_data(listing, contents, outcome, record.running, record.profile, record.curve)
        page.write(data, html)
    notes = [*record.profile.summary(), *summary.made_for(contents), *summary.left_out(contents)]
    if outcome != record.outcome:
        notes.append(f"the search scored it layer by layer in int8: {record.outcome.score:.6g}")
    if record.memory == "small":
        decoding = fastest_ms({"all": lambda: _decode_all(model)})["all"]
        notes = [f"weights stay as they are in the file; decoding all of them takes {decoding:.1f} ms"]
        grouped = sum(isinstance(stored.coded.format, Grouped) for stored in contents.tensors)
        if grouped:
            notes.append(f"but {grouped} whose steps belong to groups of columns are floats: no kernel takes them")
    return summary.report(listing, contents, outcome, record.running, notes)


def _decode_all(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Counterpart):
            for attribute in module.pared_views:
                module.pared_decode(attribute)


# What a quantized model offers in addition to its own class, and whether that is a method. A model that has one of
# these names, or whose forward assigns to it, keeps its own; the functions of `pared` work for every model. All but the
# first four are older names of what `q.pared` has.
_OFFERED: Final[Mapping[str, tuple[Callable[..., Any], bool]]] = {
    "save": (save, True),
    "export": (export, True),
    "report": (report, True),
    "pared": (Result, False),
    "nbytes": (nbytes, False),
    "curve": (curve_of, True),
    **{
        name: (lambda model, name=name: getattr(Result(model), name), False)
        for name in ("met", "score", "baseline", "trials", "plan", "engine", "engine_ms")
    },
}


def _quantized_class(base: type[nn.Module], offered: frozenset[str]) -> type[nn.Module]:
    def members() -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name in sorted(offered):
            function, is_method = _OFFERED[name]
            names[name] = Offered(function, is_method=is_method)
        if hasattr(base, "save_pretrained"):
            names["save_pretrained"] = save_pretrained if is_pretrained(base) else refuse_save_pretrained
        return names

    return subclass_of(base, Quantized, offered, members)


def assemble(
    tensors: ModelTensors[ModuleT],
    contents: Contents,
    profile: Profile,
    memory: Memory = "fast",
    captures: Mapping[str, Capture] = MappingProxyType({}),
    into: ModuleT | None = None,
    dtype: torch.dtype | None = None,
) -> ModuleT:
    """Make the quantized model out of a float model or an empty skeleton, and contents that fit it.

    Args:
        tensors: the tensors of the model that gives the structure and the class; it is not changed, and its numbers
            are not used.
        contents: every tensor.
        profile: the measured times that decide which layers run in int8 on this machine.
        memory: "small": every weight on a grid without groups stays as the contents have it, codes or not decoded,
            and is decoded whenever it is read.
        captures: turns calls into graphs, by the name of the submodel, or "" for those of the model. Default: each is
            captured again.
        into: an object of the model's class that becomes the quantized model, and loses what it was; None: a new one.
        dtype: the type in which the model runs, with weights of linear layers in codes; None: as it was fitted.

    Raises:
        MismatchError: the contents do not fit the model, or it has a meta tensor that is in no state dict.
    """
    model = tensors.model
    check_unquantized(model)
    contents = completed(tensors, contents)
    if dtype is not None:
        contents = in_type(contents, tensors, dtype)
    pairs = match(tensors, contents)
    running = running_of(model, contents, profile, memory)
    in_codes = held_in_codes(model, pairs, contents, running, memory, weight_only=dtype is not None)
    replacement: dict[int, Tensor] = {}
    for stored, objects in pairs:
        if stored.name in in_codes:
            new = torch.empty(stored.coded.shape, dtype=stored.coded.dtype, device="meta")
        else:
            new = stored.coded.decode()
        replacement |= {id(tensor): like(new, tensor) for tensor in objects}
    clone = clone_structure(model, replacement, into).eval()
    for name in extra.restore(clone, contents.states):
        log.warning("%s: the artifact holds no extra state of this module: it keeps that of the model passed", name)
    stored_forms = install(clone, contents, in_codes, running)
    if in_codes:
        keep_freed_memory()
        leave_fast_paths(clone)
    _refuse_meta(clone)
    known = tuple((stored.names, stored.kind, stored.decision) for stored in contents.tensors)
    provenance = dict(contents.provenance)
    outcome = Outcome.from_json(provenance.pop("outcome", {}))
    record = Record(
        known, stored_forms, dict(contents.activations), provenance, profile, running, memory, outcome, dtype
    )
    offered = free_names(clone, _OFFERED)
    _serve(clone, profile, captures, by_modules=memory == "small" or dtype is not None)
    clone.__class__ = _quantized_class(type(clone), offered)  # type: ignore[assignment]  # a subclass
    clone.__dict__[RECORD] = record
    return clone


def _serve(model: nn.Module, profile: Profile, captures: Mapping[str, Capture], *, by_modules: bool) -> None:
    """Let something faster than modules answer the calls of the model and its submodels, where that was measured."""
    if by_modules:
        serve(model, GraphServer(outline_of))
        return
    modules = dict(model.named_modules())
    for name, timing in profile.submodels.items() if profile.model.kernel != "float32" else ():
        if name in modules and timing.forms:
            serve(modules[name], _server(timing, captures.get(name, kept.captured)))
    captured = captures.get("", kept.captured)
    serve(model, _unsettled(profile, captured) or _server(profile.model, captured))


def _unsettled(profile: Profile, captured: Capture) -> Server | None:
    """What measures again at the first calls of each kind, where the machine was busy; None where it was not."""
    timing = profile.model
    if not profile.busy or timing.kernel != "int8":
        return None
    forms: dict[Form, KindServer] = {}
    if calls := timing.kinds_with("graph"):
        forms["graph"] = GraphServer(outline_of, calls, captured)
    if calls := timing.kinds_with("openvino"):
        forms["openvino"] = OpenVinoServer(outline_of, calls, captured)
    served = [one for one in timing.served if one.form in forms]
    return SettlingServer(outline_of, timing.largest_calls, forms, served) if forms else None


def _server(timing: ModelTiming, captured: Capture) -> Server:
    """What answers the calls that something other than the modules was fastest for, of the sizes for which it was."""
    makes: dict[Form, Callable[..., Server]] = {
        "float32": partial(FloatServer, floats_of, dtype=torch.float32),
        "bfloat16": partial(FloatServer, floats_of, dtype=torch.bfloat16),
        "openvino": partial(OpenVinoServer, outline_of, captured=captured),
        "graph": partial(GraphServer, outline_of, captured=captured),
    }
    found = []
    for form in timing.forms:
        served = [one for one in timing.served if one.form == form]
        found.append(makes[form]([one.example for one in served], sizes=[(one.least, one.below) for one in served]))
    return found[0] if len(found) == 1 else FirstOf(found)


def _refuse_meta(model: nn.Module) -> None:
    left = [name for name, tensor in named_tensors(model) if tensor.is_meta]
    reach = Reach(model)
    left += [reach.places[key] for key, one in reach.tensors.items() if one.is_meta]
    if left:
        raise MismatchError(
            "is on the meta device and in no state dict, so the artifact does not hold it",
            where=left[0],
            remedy="Register it as a buffer, or build the architecture on the CPU.",
        )
