"""`make bench-damage`: does the measured damage match the predicted damage? JSON in `out/bench`, `docs/damage.svg`.

One tensor of a model is rounded, as the library does it, at several steps; the damage that the outputs then have, on
data that no statistics come from, stands against what the tensor's curve promised. The same for the inputs of layers:
a layer's int8 counterpart against the cost that calibration names. Asked for: a rank correlation of 0.9, and a
geometric mean of measured over predicted between 1/2 and 2, over at least 40 pairs of each model's weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples import minilm
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import data, zoo
from bench.calibrated import Calibrated
from bench.scatter import picture
from pared.fitting.rounding import encoding, plan
from pared.fitting.search.activations import Candidate, find_candidates
from pared.fitting.search.free.on_grids import FreeTensor, rounded, trace_tensor
from pared.model.calls import Call
from pared.model.contents import Stored
from pared.model.copies import shadow
from pared.model.outputs import Leaf, leaves_of
from pared.model.tensors import find_tensors

RESULTS = Path("out/bench/damage.json")
PICTURE = Path("docs/damage.svg")
WIDTH = 130  # of the table, also where standard output is not a terminal

PAIRS = 44  # about that number for each model
BITS = (6.0, 4.5, 3.5, 2.5)  # where there are tensors enough; else as many rates as it takes, between the same ends
LEAST_PAIRS, LEAST_RANK, MOST_FACTOR = 40, 0.9, 2.0
_WINDOWS = 500  # of text that judge textgenrnn


@dataclass(frozen=True)
class Pair:
    """One tensor at one step, or one layer's input treated in one way."""

    name: str
    what: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Verdict:
    """How well predictions hold.

    Args:
        pairs: how many.
        rank: Spearman's correlation.
        factor: the geometric mean of measured over predicted.
        slope: the slope of the straight line through the logarithms, by least squares.
        spread: the spread of the logarithm of measured over predicted: the factor within which two thirds lie.
    """

    pairs: int
    rank: float
    factor: float
    slope: float
    spread: float

    @property
    def passed(self) -> bool:
        return self.pairs >= LEAST_PAIRS and self.rank >= LEAST_RANK and 1 / MOST_FACTOR <= self.factor <= MOST_FACTOR

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Verdict:
        x, y = (np.log([getattr(pair, which) for pair in pairs]) for which in ("predicted", "measured"))
        rank = float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])
        slope = float(np.polyfit(x, y, 1)[0])
        return cls(len(pairs), rank, float(np.exp((y - x).mean())), slope, float(np.exp((y - x).std())))


class Judge:
    """A copy of a model that errors are put into, and its own outputs on unseen calls."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model, self._calls = shadow(model), calls
        self.tensors = {model_tensor.name: model_tensor.tensor for model_tensor in find_tensors(self.model)}
        self._expected = list(self._leaves())
        self._energies = np.sum([[leaf.energy() for leaf in leaves] for leaves in self._expected], axis=0)

    def _leaves(self) -> Iterator[list[Leaf]]:
        with torch.no_grad():
            for call in self._calls:
                yield leaves_of(self.model(*call.args, **call.kwargs))

    def rebase(self) -> None:
        """Errors are from now on those against the outputs of the copy as it is now; relative to the same energy."""
        self._expected = list(self._leaves())

    def damage(self) -> float:
        errors = [
            [target.error(leaf.value) for leaf, target in zip(leaves, expected, strict=True)]
            for leaves, expected in zip(self._leaves(), self._expected, strict=True)
        ]
        return float((np.sum(errors, axis=0) / self._energies).mean())

    def with_tensor(self, name: str, value: Tensor) -> float:
        """The damage while one tensor has another value."""
        tensor = self.tensors[name]
        own = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(value)
            found = self.damage()
            tensor.copy_(own)
        return found

    def with_module(self, name: str, module: nn.Module) -> float:
        """The damage while another module stands in for one."""
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        own = owner.get_submodule(child)
        setattr(owner, child, module)
        found = self.damage()
        setattr(owner, child, own)
        return found


def weights(known: Calibrated, judge: Judge, pairs: int = PAIRS) -> Iterator[Pair]:
    """Weights of two or more dimensions, spread over the model, each at rates from 6 to 2.5 bits."""
    tensors = [
        model_tensor
        for model_tensor in known.model_tensors
        if model_tensor.weight_like and model_tensor.name in known.sensitivity.tensors
    ]
    wanted = min(len(tensors), -(-pairs // len(BITS)))
    chosen = [tensors[i] for i in np.linspace(0, len(tensors) - 1, wanted).round().astype(int)]
    rates = BITS if wanted * len(BITS) >= pairs else np.linspace(BITS[0], BITS[-1], -(-pairs // wanted))
    for model_tensor in chosen:
        free = trace_tensor(model_tensor, known.sensitivity.tensors[model_tensor.name])
        for option in dict.fromkeys(_option(free, float(bits)) for bits in rates):
            predicted = float(free.options.damage[option])
            what = f"{8 * free.options.nbytes[option] / model_tensor.tensor.numel():.2f} bits"
            yield Pair(
                model_tensor.name, what, predicted, judge.with_tensor(model_tensor.name, rounded(free, option).decode())
            )


def _option(free: FreeTensor, bits: float) -> int:
    """The option on a grid whose rate is nearest."""
    nbytes = free.options.nbytes[: len(free.curve.codes)]
    return int(np.abs(8 * nbytes / free.model_tensor.tensor.numel() - bits).argmin())


def inputs(known: Calibrated, judge: Judge, layers: int = PAIRS // 2) -> Iterator[Pair]:
    """Layers with 8-bit weights, whose inputs alone are rounded: by static ranges, and row by row."""
    decisions = plan.make_plan(known.model_tensors, ())
    stored = [
        Stored(model_tensor.names, model_tensor.kind, encoding.encode(model_tensor, decision), decision)
        for model_tensor, decision in zip(known.model_tensors, decisions, strict=True)
    ]
    found = [c for c in find_candidates(known.model, stored, known.seen.inputs) if _is_measured(c, known)]
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(layers, len(found))).round().astype(int)]
    with torch.no_grad():
        for candidate in chosen:
            (weight,) = candidate.tensors
            judge.tensors[weight.name].copy_(weight.coded.decode())
    judge.rebase()
    for candidate in chosen:
        yield from _modes(known, judge, candidate)


def _is_measured(candidate: Candidate, known: Calibrated) -> bool:
    """Whether it is a layer with one weight, and what rounding its input costs is known."""
    is_table = candidate.layer.modes == ("gather",)
    return not is_table and len(candidate.tensors) == 1 and candidate.tensors[0].name in known.sensitivity.inputs


def _modes(known: Calibrated, judge: Judge, candidate: Candidate) -> Iterator[Pair]:
    (weight,) = candidate.tensors
    noise = known.sensitivity.inputs[weight.name]
    for mode in ("static", "dynamic"):
        *_, activation = candidate.options(mode)  # the last leaves no outliers out
        measured = judge.with_module(candidate.name, candidate.counterpart(activation))
        yield Pair(weight.name, mode, noise.cost(activation), measured)


def _calls(batches: Sequence[Any]) -> list[Call]:
    return [Call((), batch) if isinstance(batch, dict) else Call((batch,), {}) for batch in batches]


def unseen_documents() -> list[Call]:
    texts = minilm.documents()
    return _calls([minilm.tokenize(batch, 128) for batch in data.batches(texts, 8)])


def unseen_photos() -> list[Call]:
    """Those that calibrate for the other seed come from the other half."""
    return _calls([*_batches("efficientnet", 1)])


def unseen_windows() -> list[Call]:
    """Some that calibrate for another seed, without any that calibrate for this one."""
    known = {tuple(row) for batch in _batches("textgenrnn", 0) for row in batch.tolist()}
    fresh = [row for batch in _batches("textgenrnn", 1) for row in batch if tuple(row.tolist()) not in known]
    return _calls([torch.stack(fresh[:: len(fresh) // _WINDOWS])])


def _batches(name: str, seed: int) -> Iterator[Tensor]:
    calibration = zoo.find(name).calibration(seed)
    assert isinstance(calibration, list)
    yield from calibration


MODELS: dict[str, Callable[[], list[Call]]] = {
    "minilm": unseen_documents,
    "efficientnet": unseen_photos,
    "textgenrnn": unseen_windows,
}


def measure(name: str, pairs: int) -> dict[str, list[Pair]]:
    pair = zoo.find(name)
    model = pair.load()
    calibration = minilm.calibration() if name == "minilm" else pair.calibration(0)
    known, calls = Calibrated.on(model, calibration), MODELS[name]()
    found = {f"{pair.name}, weights": list(weights(known, Judge(model, calls), pairs))}
    if name == "minilm":
        found[f"{pair.name}, inputs of layers"] = list(inputs(known, Judge(model, calls), pairs // 2))
    return found


def show(found: dict[str, list[Pair]]) -> None:
    table = Table(title="Damage: measured on unseen data against predicted")
    for column in ("what", "pairs", "Spearman", "measured / predicted", "log-log slope", "spread", "passed"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, pairs in found.items():
        v = Verdict.of(pairs)
        row = (f"{v.rank:.3f}", f"{v.factor:.2f}", f"{v.slope:.2f}", f"x {v.spread:.2f}", "yes" if v.passed else "NO")
        table.add_row(name, str(v.pairs), *row)
    Console(width=WIDTH).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of each model; fewer to try it out")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        print(f"{name} ...", flush=True)
        for title, pairs in measure(name, options.pairs).items():
            verdict = Verdict.of(pairs)
            records[title] = {
                "verdict": {**asdict(verdict), "passed": verdict.passed},
                "pairs": [asdict(pair) for pair in pairs],
            }
        RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    found = {title: [Pair(**pair) for pair in record["pairs"]] for title, record in records.items()}
    points = {title: [(pair.predicted, pair.measured) for pair in pairs] for title, pairs in found.items()}
    PICTURE.write_text(picture(points, "predicted damage", "measured damage"), encoding="utf-8")
    show(found)
    print(f"written: {RESULTS}, {PICTURE}")


if __name__ == "__main__":
    main()
