"""Public models, all from packages but for one that is trained here, and real or exactly known data: the search bench.

One module per model, each with a `PAIR`; only the packages of the model that is asked for are needed.
"""

from __future__ import annotations

import importlib

from bench.zoo.pair import Pair

NAMES = (
    *("efficientnet", "minilm", "smollm2", "whisper", "crepe", "g2p", "easyocr", "textgenrnn"),
    *("crepe_full", "silero", "mtcnn", "mnist", "craft", "esrgan"),
)


def find(name: str) -> Pair:
    """The pair of one of `NAMES`."""
    pair: Pair = importlib.import_module(f"bench.zoo.{name}").PAIR
    return pair
