"""`make bench-architectures`: every architecture of transformers that can be made small, one process each, as JSON.

Runs that are in the JSON are not repeated without `--force`; `make results-docs` writes them into the documents.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path("out/bench/architectures.json")
SECONDS: Final = 300  # of processor for one architecture, then its process is killed
WAIT: Final = 1800  # seconds on the clock
MEMORY: Final = 6 * 2**30  # bytes of one process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types of transformers; all if none is given")
    parser.add_argument("--force", action="store_true", help="measure again what is in the JSON")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measured(options.names[0])))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = options.names or _names()
    missing = [name for name in names if options.force or name not in found]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        for name, row in zip(missing, pool.map(_in_a_process, missing), strict=True):
            found[name] = row
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1))
            print(name, {k: v for k, v in row.items() if k != "name"}, flush=True)


def _names() -> list[str]:
    from bench.architectures.small import architectures  # transformers takes seconds

    return architectures()


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench.architectures", "--child", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no answer in {WAIT} s", "raw": True}
    lines = ended.stdout.strip().splitlines()
    if ended.returncode != 0 or not lines:
        return {"name": name, "error": f"the process ended with {ended.returncode}: {ended.stderr[-200:]}", "raw": True}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def _measured(name: str) -> dict[str, Any]:
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    import torch
    import transformers

    from bench.architectures.measure import measure  # after the limit
    from bench.architectures.small import NotSmallError

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return asdict(measure(name))
    except NotSmallError as error:
        return {"name": name, "skipped": str(error)}


if __name__ == "__main__":
    main()
