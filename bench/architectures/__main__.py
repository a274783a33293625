"""`make bench-architectures`: every architecture of transformers that can be made small, one process each, as JSON.

Runs that are in the JSON are not repeated without `--force`; `make results-docs` writes them into the documents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from bench.architectures import child

RESULTS: Final = Path("out/bench/architectures.json")
WAIT: Final = 1800  # seconds on the clock

# All are forked from one that has imported torch and transformers, which takes longer than many a measurement.
PROCESSES: Final = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types of transformers; all if none is given")
    parser.add_argument("--force", action="store_true", help="measure again what is in the JSON")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = options.names or _names()
    missing = [name for name in names if options.force or name not in found]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    PROCESSES.set_forkserver_preload(
        ["torch", "transformers", "bench.architectures.measure", "bench.architectures.child"]
    )
    with ThreadPoolExecutor(options.workers) as pool:
        for name, row in zip(missing, pool.map(_in_a_process, missing), strict=True):
            found[name] = row
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1))
            print(name, {k: v for k, v in row.items() if k != "name"}, flush=True)


def _names() -> list[str]:
    from bench.architectures.small import architectures  # transformers takes seconds

    return architectures()


def _in_a_process(name: str) -> dict[str, Any]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child.run, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] | None = ours.recv() if ours.poll(WAIT) else None
        error = f"no answer in {WAIT} s"
    except EOFError:
        row = None
        process.join()
        error = f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    return {"name": name, "error": error, "raw": True} if row is None else row


if __name__ == "__main__":
    main()
