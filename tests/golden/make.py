"""Write the golden files of a format version: `python -m tests.golden.make v2`. Released ones are never written again.

Each holds the same small network; `decoded.pt` holds what every tensor must decode to, bit for bit.
"""

import sys
from pathlib import Path

import torch

from pared import artifact
from pared.container import FILE_NAMES
from pared.model import contents_of
from tests.test_artifact import quantized

if __name__ == "__main__":
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir(exist_ok=False)
    contents = contents_of(quantized())
    for kind in FILE_NAMES:
        (folder / f"net.{kind}").write_bytes(artifact.to_bytes(contents, kind))
    torch.save({stored.name: stored.coded.decode() for stored in contents.tensors}, folder / "decoded.pt")
