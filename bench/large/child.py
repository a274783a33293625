"""One fit block by block, on random tokens."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.fit import fit_folder


def main(folder: Path, work: Path, output: Path, samples: int, tokens: int, bits: float) -> None:
    """Fit it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    model = skeleton_in(folder)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    rows = next(iter(model.parameters())).shape[0]
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, rows, (1, tokens), generator=generator)} for _ in range(samples)]
    conf = PostTrainingQuantConfig(approach="weight_only", max_size=int(numbers * bits / 8))
    fit_folder(folder, conf, batches, work, output)


if __name__ == "__main__":
    at = [Path(text) for text in sys.argv[1:4]]
    main(at[0], at[1], at[2], int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
