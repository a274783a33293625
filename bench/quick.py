"""A checkpoint of 10 GB in shards, without the bytes: how long `pared inspect --quick` takes, and how much memory.

The files are sparse: headers are written, tensors are holes, so that any disk has room for them (`make bench-quick`).
"""

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS, LAYERS, WIDTH = 10, 4, 8192  # 10 x 4 float32 matrices of 8192 x 8192, and a bias for each
LIMITS = {"seconds": 2.0, "MB": 300.0}


def write(folder: Path) -> int:
    """The checkpoint; its bytes."""
    placed, total = {}, 0
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for layer in range(LAYERS):
            for part, shape in (("weight", [WIDTH, WIDTH]), ("bias", [WIDTH])):
                nbytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                tensor = f"model.layers.{shard * LAYERS + layer}.{part}"
                header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + nbytes]}
                placed[tensor] = name
                offset += nbytes
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        total += 8 + len(text) + offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text("{}")
    return total


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        nbytes = write(Path(temporary))
        begun = time.perf_counter()
        command = [sys.executable, "-m", "pared", "inspect", temporary, "--quick", "--json"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    rows = json.loads(shown.stdout)["rows"]
    assert sum(row["bytes"] for row in rows) > nbytes
    print(f"{nbytes / 1e9:.2f} GB, {len(rows)} rows: {seconds:.2f} s (<= {LIMITS['seconds']}),", end=" ")
    print(f"{peak:.0f} MB at most (<= {LIMITS['MB']:.0f})")


if __name__ == "__main__":
    main()
