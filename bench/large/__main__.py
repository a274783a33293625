"""`python -m bench.large`: seconds, resident peak and file size of a fit block by block; `make bench-large`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench.large.random_model import SHAPES, write

_EVERY = 0.05  # seconds between looks at the memory


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process: of its own, and of files that are mapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.startswith(("RssAnon", "RssFile", "VmRSS")))
    return {name.rstrip(":"): 1024 * int(number) for name, number, *_ in found}


def main() -> None:
    """Make a model if there is none, fit it in a process of its own, and print what that took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", choices=SHAPES, default="qwen-1.5b")
    options.add_argument("--folder", type=Path, help="a folder to fit instead of a random model")
    options.add_argument("--layers", type=int, help="of the random model, instead of all of them")
    options.add_argument("--workers", type=int, default=0, help="of one core each, on Ray; 0: this machine without Ray")
    options.add_argument("--out", type=Path, default=Path("out/large"))
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--tokens", type=int, default=256, help="of each sample")
    options.add_argument("--bits", type=float, default=3.5)
    options.add_argument("--seconds", type=float, default=float("inf"), help="kill it then; call it again to go on")
    given = options.parse_args()
    if given.folder and given.layers:
        options.error("--layers is for the random model")
    layers = given.layers or SHAPES[given.shape]["num_hidden_layers"]
    folder = given.folder or given.out / (f"{given.shape}-{layers}" if given.layers else given.shape)
    if not (folder / "config.json").is_file():
        write(folder, {**SHAPES[given.shape], "num_hidden_layers": layers})
    name = f"{folder.name}-on-{given.workers}" if given.workers else folder.name
    work, output = given.out / f"{name}-work", given.out / f"{name}-{given.bits:g}"
    values = (folder, work, output, given.samples, given.tokens, given.workers, given.bits)
    began, peak = time.perf_counter(), {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    child = subprocess.Popen([sys.executable, "-m", "bench.large.child", *map(str, values)])
    while child.poll() is None:
        now = resident(child.pid)
        peak = {name: max(most, now.get(name, 0)) for name, most in peak.items()}
        if time.perf_counter() - began > given.seconds:
            child.kill()
            print("killed: call it again to go on")
        time.sleep(_EVERY)
    seconds = time.perf_counter() - began
    shown = ", ".join(f"{name} {most / 1e9:.2f} GB" for name, most in peak.items())
    where = " of the driver" if given.workers else ""
    print(f"{name}: exit {child.returncode} after {seconds:.0f} s; most resident{where}: {shown}")
    artifact = output / "best_model.safetensors"
    if artifact.is_file():
        print(f"{artifact}: {artifact.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
