"""Real models and real data, all from packages, for the demo, the tests and the bench.

Every module offers `load()` (the FP32 model, in eval mode), `skeleton()` (the same architecture on the meta
device: no weights are read), `calibration()` (batches for `pared.fit`) and a measure of quality. Nothing uses
the network.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it.

    The data packages are installed without their dependencies, so importing them would fail.

    Raises:
        FileNotFoundError: the package is not installed.

    >>> package_folder("torch").name
    'torch'
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"The package {package!r} is not installed: run `make setup`.")
    return Path(spec.origin).parent
