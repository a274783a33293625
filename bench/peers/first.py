"""From nothing to the first answer: a new process makes MiniLM, from floats or from our file, and calls it once.

PyTorch and Transformers are imported before the clock starts; all that `pared` imports, and what it converts at the
first call, counts. So this module imports nothing that imports `pared`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from examples import minilm

SUBJECT = "minilm"
FORMS = ("float32", "pared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("files", type=Path, help="the directory that `pared.save` wrote")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = minilm.tokenize([minilm.documents()[0]], 128)
    start = time.perf_counter()
    with torch.no_grad():
        if options.form == "pared":
            import pared

            model = pared.load(options.files, model=minilm.skeleton())
        else:
            model = minilm.load()
        model(**inputs)
    print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    main()
