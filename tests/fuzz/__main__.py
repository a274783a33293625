"""`python -m tests.fuzz N [SECONDS]`: N damaged files for every reader, each within a second by default."""

import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.driver import started


def main() -> None:
    """Fuzz, and end with status 1 if a reader broke a promise."""
    count = int(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    folder = Path(tempfile.mkdtemp(prefix="pared-fuzz-"))
    begun, failed = time.monotonic(), 0
    with started(folder, count, seconds) as running:
        for kind, future in running.items():
            wrong = future.result()
            failed += bool(wrong)
            sys.stdout.write(f"{kind}: {wrong or f'{count:,} files, all well'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{time.monotonic() - begun:.0f} s\n")
    raise SystemExit(min(1, failed))


if __name__ == "__main__":
    main()
