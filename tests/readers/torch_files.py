"""Files of torch, as bytes: written, listed, and with a pickle of one's own."""

import io
import zipfile
from typing import Any

import torch
from torch import nn

from pared.files.disk import open_file
from pared.readers.kinds import list_tensors
from pared.readers.listing import Listing


def listed(file: bytes) -> Listing:
    with open_file(file, "file") as opened:
        return list_tensors(opened)


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("count", torch.tensor(3))


def with_pickle(pickled: bytes, **more: bytes) -> bytes:
    """A torch zip around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def replaced(file: bytes, **changes: bytes | None) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        content = {n.removeprefix("archive/"): archive.read(n) for n in archive.namelist()}
    merged = {**content, **changes}
    return with_pickle(merged.pop("data.pkl") or b"", **{k: v for k, v in merged.items() if v is not None})


STATE = saved({"w": torch.ones(3, 4), "b": torch.ones(3)})
PICKLE = zipfile.ZipFile(io.BytesIO(STATE)).read("archive/data.pkl")
