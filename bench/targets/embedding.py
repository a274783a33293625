"""Models that turn texts into vectors: at the bytes of OpenVINO's int4, and at those of llama.cpp's Q4_0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from examples import minilm

from bench.targets import formats
from bench.targets.row import Row
from bench.zoo import mpnet
from pared.model.roles import Roles, roles_of
from pared.targets.target import Offer

_SAMPLES: Final = 100
_MODELS: Final[dict[str, ModuleType]] = {"MiniLM": minilm, "mpnet": mpnet}

Plain = Callable[[int, Roles], Offer | None]


@dataclass(frozen=True)
class _Case:
    """What a model is compared with in one runtime.

    Args:
        target: the runtime.
        title: as the table shows it.
        plain: the format that a converter gives a matrix, from the number of its columns and its roles; None: floats.
        at: the format of a converter in whose bytes pared has to stay.
        bar: the largest 1 - cos ...
        share: ... or its largest share of what rounding to the nearest has.
    """

    target: str
    title: str
    plain: Plain
    at: Plain
    bar: float | None = None
    share: float = 1.0


def _everywhere(target: str, name: str) -> Plain:
    return lambda _, __: formats.offer_of(target, name)


def _llama_cpp(columns: int, roles: Roles) -> Offer | None:
    """Its plain Q4_0: a table without a head of its own is Q6_K or, where blocks of 256 do not fit, Q8_0."""
    if "other" in roles:  # positions and types of tokens
        return None
    return formats.offer_of("gguf", ("Q8_0" if columns % 256 else "Q6_K") if "table" in roles else "Q4_0")


_OPENVINO: Final = _everywhere("openvino", "i4 g64")
# OpenVINO's own int4, with data, AWQ and scale estimation, has 0.042 on MiniLM. mpnet has an attention that llama.cpp
# does not know: its row says what its formats would hold.
_CASES: Final = (
    _Case("openvino", "OpenVINO", _OPENVINO, _OPENVINO, 0.015),
    _Case("onnx", "MatMulNBits", _everywhere("onnx", "int4 g64"), _OPENVINO, 0.015),
    _Case("gguf", "GGUF", _llama_cpp, _llama_cpp, share=0.5),
)


def rows() -> Iterator[Row]:
    for name, source in _MODELS.items():
        for case in _CASES:
            yield row(name, source, case)


def row(name: str, source: ModuleType, case: _Case) -> Row:
    """One model in the formats of one runtime."""
    model = source.load()
    expected = source.embed(model, source.documents())
    known = formats.prepared(model, source.calibration(), case.target, _SAMPLES)
    roles = roles_of(known.tensors)

    def like(plain: Plain) -> dict[str, Offer]:
        matrices = [one for one in known.tensors if one.tensor.dim() == 2]
        found = {one.name: plain(one.view.n_columns, roles[one.name]) for one in matrices}
        return {tensor: offer for tensor, offer in found.items() if offer is not None}

    def distance(weights: formats.Weights) -> float:
        candidate = source.load()
        candidate.load_state_dict(weights, strict=False)
        return float(source.distance(source.embed(candidate, source.documents()), expected))

    at, plain = like(case.at), like(case.plain)
    nbytes = sum(
        formats.bytes_of([one], at[one.name]) if one.name in at else 4 * one.tensor.numel() for one in known.tensors
    )
    near = distance(formats.rounded(model, lambda tensor, _: plain.get(tensor)))
    start = time.process_time()
    ours, taken, counts = formats.within(known, nbytes)
    seconds = time.process_time() - start
    bits = 8 * taken / sum(one.tensor.numel() for one in known.tensors)
    parts = ", ".join(f"{kind} {count / 1e6:.1f} M" for kind, count in sorted(counts.items()))
    bar = case.share * near if case.bar is None else case.bar
    return Row(name, f"{case.title} ({parts})", bits, taken, "1 - cos", 0.0, near, distance(ours), bar, seconds)
