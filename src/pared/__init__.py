"""pared: the smallest, fastest PyTorch model that keeps the accuracy you asked for.

The public names are listed in `__init__.pyi`, for type checkers and for this module alike. Each is imported when it is
first used, so that importing the package imports no torch, and `pared inspect` on a file stays light.
"""

import importlib
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _revive(*state: Any) -> Any:
    """Rebuild the quantized model that `pickle` or `torch.save` wrote: the one name of ours in such a file."""
    return importlib.import_module("pared.runtime.quantized").revive(*state)
