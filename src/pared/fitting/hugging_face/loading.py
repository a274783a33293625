"""The model of a Hugging Face folder, built by transformers; code in the folder is never run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pared.errors import ConfigError, FileError

_CONFIG: Final = "config.json"
_LANGUAGE: Final = ("ForCausalLM", "LMHeadModel")


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


def model_in(folder: Path) -> nn.Module:
    """The float model of a folder, in float32 and eval mode.

    Args:
        folder: with config.json and weights. A language model is loaded with its head, any other without one.

    Raises:
        ConfigError: there is no config.json, or its architecture is not in transformers.
        FileError: transformers cannot read the folder.
    """
    transformers = transformers_for(folder)
    if not (folder / _CONFIG).is_file():
        raise ConfigError(
            f"has no {_CONFIG}", where=str(folder), remedy="Pass a Hugging Face folder, or PKG.MOD:FACTORY."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configurations of strangers fail in many ways
        raise _unreadable(folder, error) from error
    names = [name for name in config.architectures or () if isinstance(name, str)]
    unknown = [name for name in names if not hasattr(transformers, name)]
    if unknown or not names:
        raise ConfigError(
            f"the architecture {unknown[0] if unknown else '(none is named)'} is not in transformers "
            f"{transformers.__version__}, and code in a folder is never run",
            where=str(folder / _CONFIG),
            remedy="Pass PKG.MOD:FACTORY, a function of yours that returns the model.",
        )
    language = any(name.endswith(_LANGUAGE) for name in names)
    auto: Any = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    try:
        model: nn.Module = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # so do their weights, with errors of safetensors, too
        raise _unreadable(folder, error) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # calibration reads whole windows
    return model.eval()


def _unreadable(folder: Path, error: Exception) -> FileError:
    return FileError(
        f"transformers cannot read it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=str(folder),
        remedy="Check that the folder is complete: config.json and the weights.",
    )
