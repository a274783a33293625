"""Random numbers that are drawn alike: whether a model draws any is told by whether this makes a difference."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pared.switches import DRAWING


@contextmanager
def alike(seed: int = 0) -> Iterator[None]:
    """Let torch, NumPy and Python draw the same numbers each time; their states are restored afterwards."""
    with DRAWING, torch.random.fork_rng(devices=[]):
        drawn = random.getstate(), np.random.get_state()  # the state that models may use
        try:
            random.seed(seed)
            np.random.seed(seed % (1 << 32))  # it takes no larger ones
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])


def drawn() -> object:
    """What differs after torch, NumPy or Python drew a random number."""
    return torch.random.get_rng_state().numpy().tobytes(), pickle.dumps(np.random.get_state()), random.getstate()
