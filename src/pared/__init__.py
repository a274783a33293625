"""pared: the smallest, fastest PyTorch model that keeps the accuracy you asked for.

The public names are listed in `__init__.pyi`, for type checkers and for this module alike. Each is imported when it is
first used, so that importing the package does not import torch. `inspect`, `compress`, `expand` and `compare` work on
files without torch; whatever takes a model says what to install (`pared[torch]`).

Importing it also lets `from_pretrained` of transformers open folders that pared wrote, whichever is imported first.
"""

import importlib
from types import ModuleType
from typing import Any

import lazy_loader
import wrapt

_fetch, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _offer(auto: ModuleType) -> None:
    """Offer transformers a quantizer, as soon as it has the table of them: the module registers it."""
    if hasattr(auto, "register_quantizer"):
        importlib.import_module("pared.runtime.hugging_face.quantizer")


wrapt.register_post_import_hook(_offer, "transformers.quantizers.auto")


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, at its first use.

    Raises:
        AttributeError: there is no such name.
        ConfigError: it needs torch, which is not installed.
    """
    try:
        return _fetch(name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise _fetch("ConfigError")(
            "needs torch, which is not installed",
            where=f"pared.{name}",
            remedy="pip install 'pared[torch]' (inspect, compress, expand and compare work on files without it)",
        ) from None  # the reader needs the remedy, not the chain of our imports


def _revive(*state: Any) -> Any:
    """Rebuild the quantized model that `pickle` or `torch.save` wrote: the one name of ours in such a file."""
    return importlib.import_module("pared.runtime.quantized").revive(*state)


def _revive_part(*state: Any) -> Any:
    """Rebuild a module with parametrizations in such a model: the other name, where there are any."""
    return importlib.import_module("pared.runtime.pickling.parametrized").revive_part(*state)
