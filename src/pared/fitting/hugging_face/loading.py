"""The model of a Hugging Face folder, built by transformers; code in the folder is never run."""

from __future__ import annotations

import importlib
import math
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pared import readers
from pared.errors import ConfigError, FileError, ModelError, reason_of

_CONFIG: Final = "config.json"
# Heads that only training needs: what people open such folders for is the model below.
_TRAINED_WITH: Final = ("ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction")


def transformers_for(folder: Path) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"is a Hugging Face folder, for which the package transformers is missing ({error})",
            where=str(folder),
            remedy="pip install transformers",
        ) from error


def model_in(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The float model of a folder, in eval mode.

    Args:
        folder: with config.json and weights. The model has its head, unless it is one that only training needs.
        dtype: the type of its weights; default: float32, whatever type they have in the folder.

    Raises:
        ConfigError: there is no config.json, or its architecture is not in transformers.
        FileError: transformers cannot read the folder.
    """
    config, auto = _described(folder)
    try:
        model: nn.Module = auto.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, local_files_only=True
        )
    except _failures() as error:
        raise _unreadable(folder, error) from error
    return _reading_windows(model)


def skeleton_in(folder: Path) -> nn.Module:
    """The model of a folder on the meta device: its architecture in float32, without memory for any weight.

    Tables that no file holds have their numbers. Args and errors are those of `model_in`, and:

    Raises:
        ModelError: transformers does not compute such a table apart from the model.
    """
    with torch.device("meta"):
        model = _outlined(folder)
    try:
        _compute_tables(model)
    except _failures() as error:
        if isinstance(error, ModelError):
            raise
        raise _whole_only("a table that no file holds", f": {reason_of(error)}", type(model).__name__) from error
    return _reading_windows(model)


def architecture_in(folder: Path) -> nn.Module:
    """A model of a folder's architecture, whose numbers mean nothing: on the meta device, or else on the CPU.

    Args and errors are those of `model_in`.
    """
    try:
        return skeleton_in(folder)
    except ModelError:
        return _reading_windows(_outlined(folder))


def numbers_in(folder: Path) -> int:
    """How many numbers all weights of a folder's model are; they are not read.

    Args and errors are those of `model_in`.
    """
    try:
        return sum(parameter.numel() for parameter in skeleton_in(folder).parameters())
    except ModelError:  # then as many as the files hold
        with readers.open_listing(folder) as listing:
            return sum(math.prod(tensor.shape) for tensor in listing.tensors)


def _outlined(folder: Path) -> nn.Module:
    """A folder's model as its configuration describes it, on the device of the context."""
    config, auto = _described(folder)
    try:
        headless = hasattr(auto, "from_config")
        model: nn.Module = auto.from_config(config, dtype=torch.float32) if headless else auto(config)
    except _failures() as error:
        raise _unreadable(folder, error) from error
    return model


def _compute_tables(model: Any) -> None:
    """Let transformers compute the buffers that no file holds, as it does when it opens a folder."""
    for name, module in model.named_modules():
        left = [key for key in module._non_persistent_buffers_set if module._buffers[key] is not None]
        for key in left:
            like = module._buffers[key]
            nothing = torch.nan if like.is_floating_point() else 0
            module._buffers[key] = torch.full(like.shape, nothing, dtype=like.dtype, device="cpu")
        if left:
            model._init_weights(module)
        if any(bool(module._buffers[key].isnan().any()) for key in left):
            raise _whole_only(f"the table {left[0]!r}", "", name)


def _whole_only(what: str, why: str, where: str) -> ModelError:
    return ModelError(
        f"{what} is not computed by transformers apart from the model{why}",
        where=where,
        remedy="Use the model as a whole, in memory.",
    )


def _described(folder: Path) -> tuple[Any, Any]:
    """The configuration of a folder, and the class of transformers that builds its model."""
    transformers = transformers_for(folder)
    if not (folder / _CONFIG).is_file():
        raise ConfigError(
            f"has no {_CONFIG}", where=str(folder), remedy="Pass a Hugging Face folder, or PKG.MOD:FACTORY."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _failures() as error:
        raise _unreadable(folder, error) from error
    names = [name for name in config.architectures or () if isinstance(name, str)]
    unknown = [name for name in names if not _is_model(transformers, name)]
    if unknown or not names:
        raise ConfigError(
            f"the architecture {unknown[0] if unknown else '(none is named)'} is not in transformers "
            f"{transformers.__version__}, and code in a folder is never run",
            where=str(folder / _CONFIG),
            remedy="Pass PKG.MOD:FACTORY, a function of yours that returns the model.",
        )
    headless = names[0].endswith(_TRAINED_WITH)
    return config, transformers.AutoModel if headless else getattr(transformers, names[0])


def _is_model(transformers: Any, name: str) -> bool:
    """Whether a name is that of a class of models, and of nothing else that the package has."""
    found = getattr(transformers, name, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _reading_windows(model: nn.Module) -> nn.Module:
    """The model in eval mode, without a cache: whole windows are read."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    for config in configs:  # a model of several has one for each: the root's alone switches nothing off
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model.eval()


def _failures() -> tuple[type[Exception], ...]:
    """What transformers raises of configurations and weights of strangers; not what the machine lacks."""
    of_files = importlib.import_module("safetensors").SafetensorError
    of_fields = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    of_pickles = pickle.UnpicklingError
    plain = (ArithmeticError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError)
    return (*plain, ValueError, AssertionError, of_files, of_fields, of_pickles)


def _unreadable(folder: Path, error: Exception) -> ConfigError | FileError:
    if "trust_remote_code" in str(error):
        return ConfigError(
            "needs the code in the folder, which is never run",
            where=str(folder / _CONFIG),
            remedy="Pass PKG.MOD:FACTORY, a function of yours that returns the model; or pared compress, which needs "
            "no code.",
        )
    return FileError(
        f"transformers cannot read it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=str(folder),
        remedy="Check that the folder is complete: config.json and the weights.",
    )
