"""Fits a folder block by block, and kills itself when the given number of files has been written."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pared.files import disk
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.streamed import store
from pared.fitting.streamed.deciding import coding, compressor, spilled
from pared.fitting.streamed.fit import fit_folder
from tests.fitting.streamed.models import some_calls


def main(folder: Path, workspace: Path, output: Path, most: int) -> None:
    left = [most]
    plain = disk.write_atomic

    def counted(path: Path, write: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:  # half of a file is there

            def half(file: Any) -> None:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            plain(path, half, **options)
        plain(path, write, **options)

    for module in (coding, compressor, spilled, store):
        module.write_atomic = counted  # type: ignore[attr-defined]  # as these modules call it
    batches = [dict(call.kwargs) for call in some_calls(3)]
    conf = PostTrainingQuantConfig(approach="weight_only", max_size=24_000)
    fit_folder(folder, conf, batches, workspace, output, quiet=True)
    sys.stdout.write(str(most - left[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
