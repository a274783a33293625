"""Models that turn texts into vectors, at the bytes of OpenVINO's int4."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType

from examples import minilm

from bench.targets import formats
from bench.targets.row import Row
from bench.zoo import mpnet

_SAMPLES = 100
_BAR = 0.015  # of 1 - cos; OpenVINO's own int4, with data, AWQ and scale estimation, has 0.042 on MiniLM
_MODELS: dict[str, ModuleType] = {"MiniLM": minilm, "mpnet": mpnet}


def rows() -> Iterator[Row]:
    for name, source in _MODELS.items():
        model = source.load()
        expected = source.embed(model, source.documents())
        known = formats.prepared(model, source.calibration(), "openvino", _SAMPLES)
        matrices = [one for one in known.tensors if one.tensor.dim() == 2]
        rest = sum(4 * one.tensor.numel() for one in known.tensors if one.tensor.dim() < 2)
        plain = formats.offer_of("openvino", "i4 g64")
        nbytes = rest + formats.bytes_of(matrices, plain)

        def distance(weights: formats.Weights) -> float:
            candidate = source.load()  # noqa: B023  # it is called before the next turn
            candidate.load_state_dict(weights, strict=False)
            return float(source.distance(source.embed(candidate, source.documents()), expected))  # noqa: B023  # likewise

        near = distance(formats.rounded(model, lambda _, tensor: plain if tensor.dim() == 2 else None))  # noqa: B023  # likewise
        start = time.process_time()
        ours, taken, counts = formats.within(known, nbytes)
        seconds = time.process_time() - start
        bits = 8 * taken / sum(one.tensor.numel() for one in known.tensors)
        parts = ", ".join(f"{kind} {count / 1e6:.1f} M" for kind, count in sorted(counts.items()))
        yield Row(name, f"OpenVINO ({parts})", bits, taken, "1 - cos", 0.0, near, distance(ours), _BAR, seconds)
