"""What happens to one architecture: fit at 8 bits, save, load, copy, generate; an error names the step before it."""

from __future__ import annotations

import copy
import io
import math
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import pared
from bench.architectures.small import Small, call_of, small
from pared import PostTrainingQuantConfig

LEAST_DECIBELS: Final = 25.0  # below, weights alone are measured as well
_TURNS: Final = 20  # of a timed call, of which the fastest counts
_NEW_TOKENS: Final = 4


@dataclass(frozen=True)
class Row:
    """One architecture. Sizes in bytes, times in seconds of processor, the ratio is of the fastest calls.

    Args:
        error: the step that failed, the type of the error and its first words; empty if nothing did.
        raw: whether an error was not one of pared's family.
        sqnr: dB, of all floats of the output together; infinite if nothing was lost.
        weights_sqnr: the same with weights alone quantized; only measured where `sqnr` is low.
        equal: whether the loaded model answers as the fitted one, bit for bit; None if it was not reached.
    """

    name: str
    model: str = ""
    parameters: int = 0
    error: str = ""
    raw: bool = False
    fit_seconds: float = math.nan
    source_bytes: int = 0
    nbytes: int = 0
    sqnr: float = math.nan
    weights_sqnr: float | None = None
    equal: bool | None = None
    generates: bool | None = None
    call_ratio: float = math.nan


def measure(name: str) -> Row:
    """Take one architecture through everything; NotSmallError if it cannot be made small."""
    made = small(name)
    facts: dict[str, Any] = {
        "name": name,
        "model": type(made.model).__name__,
        "parameters": sum(p.numel() for p in made.model.parameters()),
    }
    try:
        for facts["step"], found in _steps(made):
            facts |= found
    except Exception as error:  # noqa: BLE001  # every error is a row of the table
        first = " ".join(str(error).split())[:300]
        facts |= {
            "error": f"after {facts['step']}: {type(error).__name__}: {first}",
            "raw": not isinstance(error, pared.ParedError),
        }
    del facts["step"]
    return Row(**facts)


def _steps(made: Small) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each step that is done, and what it found."""
    model, call = made.model, made.call
    yield "start", {"source_bytes": _state_bytes(model)}
    calls = [call, call_of(model, seed=1)]
    began = time.process_time()
    q: Any = pared.fit(model, PostTrainingQuantConfig(quant_level=0), calls, quiet=True)
    yield "fit", {"fit_seconds": time.process_time() - began}
    exact, found = _answer(model, call), _answer(q, call)
    sqnr = decibels(exact, found)
    yield "call", {"sqnr": sqnr}
    if sqnr < LEAST_DECIBELS:
        alone = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="weight_only"), calls, quiet=True)
        yield "weights alone", {"weights_sqnr": decibels(exact, _answer(alone, call))}
    with tempfile.TemporaryDirectory() as folder:
        q.save(folder)
        yield "save", {"nbytes": (Path(folder) / "best_model.pt").stat().st_size}
        loaded: Any = pared.load(folder, model=type(model)(model.config).eval())
        yield "load", {"equal": _same(found, _answer(loaded, call))}
    for way, other in (("deepcopy", copy.deepcopy(q)), ("pickle", pickle.loads(pickle.dumps(q)))):
        yield way, {} if _same(found, _answer(other, call)) else {"equal": False}
    if _generates(model, call):
        yield "generate", {"generates": torch.equal(_generated(q, call), _generated(loaded, call))}
    ratio = _fastest(lambda: _answer(q, call)) / _fastest(lambda: _answer(model, call))
    yield "time", {"call_ratio": ratio}


def _state_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _answer(model: nn.Module, call: Mapping[str, Any]) -> list[Tensor]:
    """All floats that the model answers with, in order."""
    torch.manual_seed(0)
    with torch.no_grad():
        answer = model(**{k: v.clone() for k, v in call.items()})
    values = _pytree.tree_leaves(dict(answer) if isinstance(answer, Mapping) else answer)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def decibels(exact: list[Tensor], found: list[Tensor]) -> float:
    """The worst output's ratio of signal to error; of outputs whose shape is the same in both."""
    ratios = [math.inf]
    for a, b in zip(exact, found, strict=True):
        if a.shape == b.shape and a.isfinite().all():
            signal, error = float(a.double().square().sum()), float((a.double() - b.double()).square().sum())
            ratios.append(
                math.inf
                if error == 0
                else -math.inf
                if not math.isfinite(error) or signal == 0
                else 10 * math.log10(signal / error)
            )
    return min(ratios)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def _generates(model: Any, call: Mapping[str, Any]) -> bool:
    """Whether the float model generates; some need settings that only their pretrained models come with."""
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate() or "input_ids" not in call:
        return False
    try:
        _generated(model, call)
    except Exception:  # noqa: BLE001  # whatever transformers raises, it is not about the quantized model
        return False
    return True


def _generated(model: Any, call: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        said: Tensor = model.generate(call["input_ids"][:1], max_new_tokens=_NEW_TOKENS, do_sample=False)
    return said


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
