"""What a listing must hold: names, types, shapes and numbers, and rows that sum to the file."""

from pathlib import Path
from typing import Any

import torch

import pared
from pared import readers
from pared.readers.listing import Listing


def check(path: Path, expected: dict[str, Any], only: bool = True) -> Listing:
    """Names, dtypes, shapes, numbers; and rows that sum to the file."""
    with readers.open_listing(path) as listing:
        found = {held.name: held for held in listing.tensors}
        assert (sorted(found) == sorted(expected)) if only else (found.keys() >= expected.keys())
        for name, value in expected.items():
            held, array = found[name], listing.array(found[name])
            tensor = torch.as_tensor(value)
            assert held.dtype == str(tensor.dtype).removeprefix("torch.")
            assert held.shape == tuple(tensor.shape)
            assert array is not None
            assert array.tobytes() == tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    check_sum(path)
    return listing


def check_sum(path: Path) -> None:
    ledger = pared.inspect(path)
    assert sum(row.nbytes for row in ledger.rows) == ledger.nbytes
    assert all(row.nbytes > 0 for row in ledger.rows if row.shape is None)
    if path.is_file():
        assert ledger.nbytes >= path.stat().st_size


def listed(path: Path) -> Listing:
    with readers.open_listing(path) as listing:
        return listing
