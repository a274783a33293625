"""`make bench-layers`: recurrent layers, the dual-path RNN, and models held in codes, as JSON in `out/bench`.

Times are medians of interleaved runs in one process with two threads; only their ratios mean something elsewhere.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from examples import dual_path, minilm
from rich.console import Console
from torch import nn

import pared
from bench import run
from pared import AccuracyCriterion, PostTrainingQuantConfig

RESULTS = run.OUT / "layers.json"
LEAST_SNR = 25.0  # dB
_INPUT, _HIDDEN, _LAYERS, _STEPS = 256, 512, 2, 100
_BATCHES: Final = (1, 8)
_ROUNDS: Final = 15
_UNSEEN: Final = 99  # the seed of a spectrum that neither calibration nor a search was given


@dataclass(frozen=True)
class Recurrent:
    """One layer at one batch size: milliseconds, and the share of the output's energy that int8 loses.

    Args:
        kernel: what "auto" chose after it had measured.
    """

    layer: str
    batch: int
    float32: float
    bfloat16: float
    ours: float
    kernel: str
    lost: float


def recurrent() -> list[Recurrent]:
    """Bidirectional layers of random weights, each beside its compressed form, on a call unknown to calibration."""
    rows = []
    for layer in (nn.LSTM, nn.GRU):
        for batch in _BATCHES:
            torch.manual_seed(0)
            model = layer(_INPUT, _HIDDEN, num_layers=_LAYERS, batch_first=True, bidirectional=True).eval()
            rows.append(_recurrent(model, batch))
    return rows


def _recurrent(model: nn.Module, batch: int) -> Recurrent:
    calls = [torch.randn(batch, _STEPS, _INPUT) for _ in range(3)]
    ours = pared.fit(model, run.EIGHT_BITS, calls[:2])
    half, x = copy.deepcopy(model).bfloat16(), calls[2]
    with torch.inference_mode():
        expected, got = model(x)[0], ours(x)[0]
        times = run.medians(
            {"float32": lambda: model(x), "bfloat16": lambda: half(x.bfloat16()), "ours": lambda: ours(x)}, _ROUNDS
        )
    lost = float((got - expected).square().sum() / expected.square().sum())
    kernels = "/".join(sorted({line.kernel for line in ours.plan if line.treatment == "grid"}))
    medians = {name: one["median"] for name, one in times.items()}
    return Recurrent(type(model).__name__, batch, **medians, kernel=kernels, lost=lost)


def dual_path_rnn() -> dict[str, Any]:
    """The model at 8 bits beside FP32 and bfloat16, and the smallest file that keeps `LEAST_SNR`."""
    model, calls = dual_path.load(), dual_path.calibration()
    eight = pared.fit(model, run.EIGHT_BITS, calls)
    half, x = dual_path.load().bfloat16(), calls[0]
    with torch.inference_mode():
        times = run.medians(
            {"float32": lambda: model(x), "bfloat16": lambda: half(x.bfloat16()), "ours": lambda: eight(x)}, _ROUNDS
        )
    criterion = AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=10 ** (-LEAST_SNR / 10))
    evaluations: list[float] = []

    def lost(candidate: nn.Module) -> float:
        evaluations.append(dual_path.snr(candidate, model))
        return float(10 ** (-evaluations[-1] / 10))

    smallest = pared.fit(model, PostTrainingQuantConfig(quant_level=1, accuracy_criterion=criterion), calls, lost)
    path = pared.save(smallest, run.OUT / "dual_path_25")
    return {
        "float_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "times": times,
        "snr": dual_path.snr(eight, model),
        "kernels": sorted({line.kernel for line in eight.pared.plan}),
        "smallest_bytes": path.stat().st_size,
        "smallest_snr": dual_path.snr(smallest, model),
        "unseen_snr": dual_path.snr(smallest, model, _UNSEEN),
        "evaluations": len(evaluations),
    }


def small_memory() -> dict[str, Any]:
    """MiniLM in floats, in codes, and what codes cost in time."""
    directory = run.OUT / "minilm" / "small"
    pared.save(pared.fit(minilm.load(), PostTrainingQuantConfig(approach="weight_only")), directory)
    models = {
        "float32": minilm.load(),
        "fast": pared.load(directory, model=minilm.skeleton()),
        "small": pared.load(directory, model=minilm.skeleton(), memory="small"),
    }
    return {
        "resident": {
            "float32": run.in_child("memory_float"),
            **{name: run.in_child("memory_pared", str(directory), name) for name in ("fast", "small")},
        },
        "own": {
            "float32": run.in_child("memory_float", "own"),
            "small": run.in_child("memory_pared", str(directory), "small", "own"),
        },
        "speed_8x128": run.speed(models, 8, 128, _ROUNDS),
        "speed_1x32": run.speed(models, 1, 32, _ROUNDS),
    }


def main() -> None:
    torch.set_num_threads(run.THREADS)
    run.OUT.mkdir(parents=True, exist_ok=True)
    found = {
        "recurrent": [asdict(row) for row in recurrent()],
        "dual_path": dual_path_rnn(),
        "memory": small_memory(),
    }
    RESULTS.write_text(json.dumps(found, indent=1), encoding="utf-8")
    Console().print_json(data=found)
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


if __name__ == "__main__":
    main()
