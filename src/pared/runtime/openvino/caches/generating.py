"""A language model as openvino-genai takes it: a graph that keeps its cache, and the tokenizer beside it."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pared.checkpoints.pretrained.folder import NOTE, check_replaceable
from pared.checkpoints.runtimes.conversion import CONFIG, config_of
from pared.errors import ConfigError, ModelError, reason_of
from pared.files.disk import as_path, check_directory, make_directory
from pared.model.contents import Contents
from pared.runtime.graphs import call_kinds
from pared.runtime.graphs.capturing.capture import FlatModel, exported
from pared.runtime.graphs.capturing.outputs import Arguments
from pared.runtime.graphs.containers import container_of
from pared.runtime.onnx.export import ARTIFACT, Exported, checksum_beside, need
from pared.runtime.openvino.caches.inside import stateful
from pared.runtime.openvino.export import OPENVINO_FILE, described, in_openvino, write
from pared.runtime.saving import TOKENIZER, is_pretrained, settings_of

log = logging.getLogger(__name__)

# The names that openvino-genai knows.
_ORDER: Final = "beam_idx"
_LOGITS: Final = "logits"
_CACHE: Final = "past_key_values"
_TOKENIZER: Final = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")

# Of the call that is captured: sizes of 1 would be taken for constants.
_TEXTS: Final = 2
_PAST: Final = 5
_NEW: Final = 3

_REMEDY: Final = "Pass example inputs: then one call is written, without a cache that is kept."


def generates(model: nn.Module) -> bool:
    """Whether a model is one of transformers that goes on with a text, and keeps all keys and values for it."""
    known: Any = model
    if not is_pretrained(type(model)) or not known.can_generate() or known.config.is_encoder_decoder:
        return False
    from transformers import DynamicCache

    return container_of(DynamicCache(config=known.config.get_text_config())) is not None


def convertible(folder: Path) -> _Tokenizer | None:
    """A folder's tokenizer, as transformers and as OpenVINO have it; None if there is none.

    Raises:
        ConfigError: the package for it is not installed, or does not know this one.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        log.warning("%s has no tokenizer: what is written takes token ids", folder)
        return None
    return _Tokenizer(folder)


def export_generating(floats: nn.Module, contents: Contents, path: str | Path, folder: Path | None) -> Exported:
    """Write a folder that openvino-genai opens.

    Args:
        floats: the float model with the weights that the codes stand for; it must not be used afterwards.
        contents: the codes and steps, and how layers treat their inputs.
        path: the directory, or the ".xml" file in it.
        folder: the Hugging Face folder with the tokenizer; None: none is written, and texts are token ids.

    Raises:
        ConfigError: the package for tokenizers is not installed, or does not know this one; or the directory holds
            another model, whose config.json would be lost.
        ModelError: the model cannot be captured, or its cache is not one of keys and values alone.
    """
    need("openvino", "openvino")
    path = as_path(path, "export")
    path = path if path.suffix == ".xml" else path / OPENVINO_FILE
    check_directory(path.parent)  # before the work, not after
    check_replaceable(path.parent)
    tokenizer = None if folder is None else convertible(folder)
    settings = settings_of(floats)
    config = {**json.loads(settings[CONFIG]), "use_cache": True}
    config.pop(NOTE, None)
    if (path.parent / CONFIG).is_file():  # if the artifact is there as well, from_pretrained still has to open it
        before = config_of(path.parent, "Choose another directory.")
        config |= {NOTE: before[NOTE]} if NOTE in before else {}
    settings[CONFIG] = json.dumps(config, indent=2).encode()
    graph, found, shapes = _graph(floats, contents)
    graph.set_rt_info(checksum_beside(path), ["framework", ARTIFACT])

    def beside(place: Path) -> None:
        for name, content in settings.items():
            (place / name).write_bytes(content)
        if tokenizer is not None:
            tokenizer.tokenizer.save_pretrained(place)

    make_directory(path.parent)
    graphs = {path.name: graph} | ({} if tokenizer is None else tokenizer.graphs)
    nbytes = write(graphs, path, beside)
    ends = {_LOGITS: (*shapes["input_ids"], graph.output(0).get_partial_shape()[2].get_length())}
    return described(found, contents, path, nbytes, shapes, ends)


class _Tokenizer:
    """A folder's tokenizer.

    Attributes:
        tokenizer: as transformers has it.
        graphs: as OpenVINO has it, by the names of files.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        made = need("openvino_tokenizers", "openvino")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            graphs = made.convert_tokenizer(self.tokenizer, with_detokenizer=True)
        except Exception as error:  # whatever either library makes of a tokenizer
            raise ConfigError(
                f"its tokenizer cannot be converted for OpenVINO: {reason_of(error)}",
                where=str(folder),
                remedy="Leave the folder out: the model is written without a tokenizer, and takes token ids.",
            ) from error
        self.graphs = dict(zip(_TOKENIZER, graphs, strict=True))


def _graph(floats: nn.Module, contents: Contents) -> tuple[Any, Any, dict[str, tuple[int | str, ...]]]:
    """The model with its cache inside, what is in it, and the shapes of its inputs."""
    arguments = _arguments(floats)
    made = Arguments(arguments)
    call = ((), {one.name: one.example() for one in arguments if not one.holds})
    try:
        program = exported(FlatModel(floats, call, made.returned, prepared=made.prepared), range)
    except Exception as error:  # torch's exporter raises whatever the model's own code makes of fake tensors
        raise ModelError(
            f"torch.export cannot capture a step of it: {reason_of(error)}", where=type(floats).__name__, remedy=_REMEDY
        ) from error
    found, shapes = in_openvino(program, floats, contents)
    inputs = [one.name for one in arguments if one.dtype]
    parameters = found.model.get_parameters()
    names = {one.output(0).get_any_name(): name for one, name in zip(parameters, inputs, strict=True)}
    sizes = {one: [n if isinstance(n, int) else -1 for n in shape] for one, shape in zip(names, shapes, strict=True)}
    kept = stateful(found.model, sizes, _ORDER)
    if kept is None or len(kept.inside.names) != sum(name.startswith(_CACHE) for name in inputs):
        raise _no_cache(floats, "a step does not join keys and values of one size each to those before")
    graph = kept.model
    (logits,) = graph.get_results()
    logits.output(0).set_names({_LOGITS})
    for parameter in graph.get_parameters():
        name = names.get(parameter.output(0).get_any_name(), _ORDER)
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
    graph.validate_nodes_and_infer_types()
    given = dict(zip(inputs, shapes, strict=True))
    return graph, found, {name: given.get(name, ("texts",)) for name in map(_name, graph.get_parameters())}


def _arguments(floats: nn.Module) -> tuple[call_kinds.Argument, ...]:
    """A step of decoding that goes on with some texts."""
    ids = torch.zeros(_TEXTS, _PAST + _NEW, dtype=torch.int64)
    step = {
        "input_ids": ids[:, _PAST:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(_PAST, _PAST + _NEW).repeat(_TEXTS, 1),
    }
    known = inspect.signature(floats.forward).parameters
    try:
        with torch.no_grad():
            past = floats(input_ids=ids[:, :_PAST], use_cache=True)[_CACHE]
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"raised {type(error).__name__} where it goes on with token 0: {error}",
            where=type(floats).__name__,
            remedy=_REMEDY,
        ) from error
    given = {name: tensor.contiguous() for name, tensor in step.items() if name in known}
    bound = call_kinds.bind((), (), {**given, _CACHE: past, "use_cache": True})
    if bound is None:
        raise _no_cache(floats, f"it is a {type(past).__name__}, whose layers hold more than all keys and values")
    return call_kinds.arguments_of(bound)


def _no_cache(floats: nn.Module, because: str) -> ModelError:
    return ModelError(f"OpenVINO cannot keep its cache: {because}", where=type(floats).__name__, remedy=_REMEDY)


def _name(parameter: Any) -> str:
    name: str = parameter.output(0).get_any_name()
    return name
