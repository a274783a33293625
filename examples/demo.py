"""Compress a real model, load it where its FP32 weights are not, measure it, and show it: `python -m examples.demo`.

all-MiniLM-L6-v2 is compressed twice: at 8 bits, and by a search for the smallest file whose embeddings of unseen
documents stay within 1 - cos = 0.005 of FP32. A new process, which never reads the FP32 weights, loads each file and
scores it on other data. Another one times FP32, bf16 and the compressed models in turn. It ends with a table and a
report to open in a browser.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pared
from examples import minilm

_THREADS = 2
_TOLERABLE = 0.005  # 1 - cos, for the search
_SIZES = ((8, 128, 30), (1, 32, 200))  # texts, tokens, rounds: a batch, and one short text


@dataclass(frozen=True)
class Row:
    """A line of the table: one model.

    Args:
        name: FP32, bf16, or what pared did.
        nbytes: the size of its file.
        distance: mean 1 - cosine of its embeddings of the Lee documents to those of FP32.
        spearman: its rank correlation with people on the pairs of these documents.
        milliseconds: medians, one for each of `_SIZES`.
    """

    name: str
    nbytes: int
    distance: float
    spearman: float
    milliseconds: list[float]


def score_alone(directory: Path) -> dict[str, Any]:
    """What the process without the FP32 weights does: load, embed, score."""
    start = time.perf_counter()
    model = pared.load(directory, model=minilm.skeleton())
    seconds = time.perf_counter() - start
    embeddings = minilm.embed(model, minilm.documents())
    spearman = minilm.spearman(embeddings)
    return {"load_seconds": seconds, "spearman": spearman, "embeddings": embeddings.tolist()}


def time_all(directory: Path) -> dict[str, list[float]]:
    """What the process that times does: median milliseconds of each model for each of `_SIZES`."""
    fp32 = minilm.load()
    models = {
        "FP32": fp32,
        "bf16": copy.deepcopy(fp32).bfloat16(),
        **{name: pared.load(directory / folder, model=minilm.skeleton()) for name, folder in _FOLDERS.items()},
    }
    medians: dict[str, list[float]] = {name: [] for name in models}
    for texts, tokens, rounds in _SIZES:
        (batch,) = minilm.calibration(texts, tokens)
        for name, milliseconds in _interleaved(models, batch, rounds).items():
            medians[name].append(milliseconds)
    return medians


@torch.inference_mode()
def _interleaved(models: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Medians over rounds in each of which every model runs once, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(3 + rounds):  # the first three warm up
        for name, model in models.items():
            start = time.perf_counter()
            model(**batch)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def run(directory: Path, console: Console) -> None:
    """The whole demo; the results are printed, and written to `demo.json` and `report.html` in the directory."""
    console.print(
        "[bold]Compressing all-MiniLM-L6-v2[/] (90.9 MB), a model that turns texts into 384 numbers each.\n",
        highlight=False,
    )
    fp32 = minilm.load()
    bf16 = copy.deepcopy(fp32).bfloat16()
    reference = minilm.embed(fp32, minilm.documents())
    rounded = minilm.embed(bf16, minilm.documents())

    files, seconds, fitted = {}, {}, fp32
    for number, (name, folder) in enumerate(_FOLDERS.items(), 1):
        _announce(console, number, f"{name}: {_WHAT[name]}")
        start = time.perf_counter()
        fitted = _compress(name, fp32)
        files[name] = pared.save(fitted, directory / folder)
        seconds[name] = time.perf_counter() - start
        size = files[name].stat().st_size
        console.print(f"    {size / 1e6:.2f} MB in {seconds[name]:.0f} s", highlight=False)

    _announce(console, 3, "loading both in new processes that never see the FP32 weights")
    alone = {name: _in_new_process("--child", directory / folder) for name, folder in _FOLDERS.items()}
    _announce(console, 4, "timing all of them in turn")
    milliseconds = _in_new_process("--clock", directory)
    _announce(console, 5, "drawing the report of the searched model")
    report = directory / "report.html"
    pared.report(fitted, html=report)

    found = {
        "FP32": (_saved_bytes(fp32), reference, minilm.spearman(reference)),
        "bf16": (_saved_bytes(bf16), rounded, minilm.spearman(rounded)),
    }
    for name, file in files.items():
        found[name] = (file.stat().st_size, torch.tensor(alone[name]["embeddings"]), alone[name]["spearman"])
    rows = [
        Row(name, nbytes, minilm.distance(embeddings, reference), spearman, milliseconds[name])
        for name, (nbytes, embeddings, spearman) in found.items()
    ]
    result = {
        "rows": [asdict(row) for row in rows],
        "sizes": _SIZES,
        "threads": _THREADS,
        "torch": torch.__version__,
        "fit_and_save_seconds": seconds,
        "load_seconds": {name: one["load_seconds"] for name, one in alone.items()},
    }
    (directory / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print("", table(rows), "", _legend(), "", _files(directory), sep="\n", highlight=False)
    console.print(f"\n[bold]Open this in a browser:[/] {report.resolve()}", highlight=False, soft_wrap=True)


_FOLDERS = {"pared, 8 bits": "eight_bits", "pared, search": "search"}
_WHAT = {
    "pared, 8 bits": "about a byte for each weight, int8 where it is faster",
    "pared, search": f"the smallest file within 1 - cos = {_TOLERABLE} of FP32",
}
_STEPS = 5


def _announce(console: Console, number: int, what: str) -> None:
    console.print(f"[bold cyan]{number}/{_STEPS}[/] {what} ...", highlight=False)


def _compress(name: str, fp32: nn.Module) -> nn.Module:
    """One of the compressed models."""
    if name == "pared, 8 bits":
        return pared.fit(fp32, pared.PostTrainingQuantConfig(quant_level=0), minilm.calibration())
    texts = minilm.unseen()
    expected = minilm.embed(fp32, texts)
    criterion = pared.AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=_TOLERABLE)
    return pared.fit(
        fp32,
        pared.PostTrainingQuantConfig(accuracy_criterion=criterion),
        minilm.calibration(),
        eval_func=lambda model: minilm.distances(minilm.embed(model, texts), expected),
    )


def table(rows: Sequence[Row]) -> Table:
    """The results, each model relative to the first, in 80 columns."""
    first = rows[0]
    result = Table(title="all-MiniLM-L6-v2")
    result.add_column("model")
    titles = ["MB", "ratio", "1 - cos", "Spearman", *(f"ms, {n} x {tokens}" for n, tokens, _ in _SIZES)]
    for title in titles:
        result.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        pairs = zip(row.milliseconds, first.milliseconds, strict=True)
        times = [f"{ms:.1f} ({ms / base:.2f}x)" for ms, base in pairs]
        ratio = f"{row.nbytes / first.nbytes:.3f}"
        distance = "0" if row is first else f"{row.distance:.5f}"
        result.add_row(row.name, f"{row.nbytes / 1e6:.2f}", ratio, distance, f"{row.spearman:.4f}", *times)
    return result


def _legend() -> str:
    rounds = " and ".join(str(rounds) for _, _, rounds in _SIZES)
    return (
        "MB        the saved file, 10^6 bytes\n"
        "1 - cos   mean distance to the FP32 embeddings of 50 news documents (Lee corpus)\n"
        "Spearman  agreement with people on the similarity of their 1225 pairs\n"
        f"ms        texts x tokens, medians of {rounds} turns, {_THREADS} threads, eager PyTorch"
    )


def _files(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return "\n".join(["Files:", *(f"  {path.stat().st_size:>10,} bytes  {path}" for path in files)])


def _saved_bytes(model: nn.Module) -> int:
    """The size of the file that `torch.save(model.state_dict(), ...)` writes."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _in_new_process(task: str, directory: Path) -> Any:
    """What a new Python process, given a task for `main`, prints as JSON."""
    command = [sys.executable, "-m", "examples.demo", task, str(directory)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Parse the command line; the two hidden tasks are for the processes that `run` starts."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.demo")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"), metavar="DIR")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--clock", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(_THREADS)
    if given.child:
        print(json.dumps(score_alone(given.child)))
    elif given.clock:
        print(json.dumps(time_all(given.clock)))
    else:
        run(given.output, Console())


if __name__ == "__main__":
    main()
