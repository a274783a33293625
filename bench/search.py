"""`make bench-search`: the smallest files that keep the accuracy, of public models, as JSON in `out/bench`.

Each model has a search set, which `pared.fit` sees, and a disjoint test set, which judges the file that was written
and read again. Tolerated on the search set: the least loss that the pair names (one percent), or two paired standard
errors if that is more: those of FP32 against a plain 8-bit model. Met on the test set: a loss of at most what was
tolerated, and two standard errors of its own. Every run has a process of its own, so that its peak memory is its own;
runs that are in the JSON already are not repeated without `--force`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pared
from bench import zoo
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion, PostTrainingQuantConfig

OUT = Path("out/bench")
RESULTS = OUT / "search.json"
ALL_SAMPLES = 10**6  # a pair's calibration data are read whole
WIDTH = 150  # of the table, also where standard output is not a terminal
COLUMNS = (
    *("model", "seed", "FP32 MB", "file MB", "ratio", "evaluations", "fit s", "peak GB"),
    *("tolerated", "search loss", "test loss", "met"),
)


@dataclass(frozen=True)
class Loss:
    """What a model lost against FP32 on the same samples, in the unit of the tolerable loss.

    Args:
        value: the loss of the means.
        error: its paired standard error.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Run:
    """One model, one seed; sizes in bytes, times in seconds.

    Args:
        floats: tensors of two or more dimensions that the file holds in floats, and why.
    """

    name: str
    note: str
    seed: int
    tolerance: float
    float_bytes: int
    nbytes: int
    evaluations: int
    fit_seconds: float
    evaluation_seconds: float
    peak_before: int
    peak: int
    search_baseline: float
    search: Loss
    test_baseline: float
    test: Loss
    search_met: bool
    test_met: bool
    metrics_float: Mapping[str, float]
    metrics: Mapping[str, float]
    trials: list[dict[str, Any]]
    floats: Mapping[str, str]

    @property
    def ratio(self) -> float:
        return self.float_bytes / self.nbytes


class Evaluation:
    """What `pared.fit` calls to score a model, and how often and for how long it did.

    The first call is for the float model, whose scores are known: it counts, but is not made again.
    """

    def __init__(self, pair: Pair, seed: int, baseline: Scores) -> None:
        self.pair, self.seed, self.baseline = pair, seed, baseline
        self.calls, self.seconds = 0, 0.0

    def __call__(self, model: nn.Module) -> Scores:
        self.calls += 1
        if self.calls == 1:
            return self.baseline
        start = time.perf_counter()
        scores = self.pair.scores(model, "search", self.seed)
        self.seconds += time.perf_counter() - start
        return scores


def loss(criterion: AccuracyCriterion, scores: Scores, baseline: Scores) -> Loss:
    """With `criterion`'s meaning of a loss."""
    mean = float(baseline.mean())
    error = float((scores - baseline).std(ddof=1)) / math.sqrt(len(scores))
    unit = abs(mean) if criterion.criterion == "relative" else 1.0
    return Loss(criterion.loss(float(scores.mean()), mean), error / unit)


def tolerance(pair: Pair, model: nn.Module, baseline: Scores, seed: int) -> float:
    """The least that the pair names, or two paired standard errors of FP32 against 8 bits."""
    least = pair.criterion.tolerable_loss
    if not pair.widened:
        return least
    plain = pared.fit(model, PostTrainingQuantConfig(quant_level=0, seed=seed), pair.calibration(seed), quiet=True)
    return max(least, 2 * loss(pair.criterion, pair.scores(plain, "search", seed), baseline).error)


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(name: str, seed: int, level: Literal[0, 1]) -> Run:
    pair = zoo.find(name)
    model = pair.load()
    baseline = pair.scores(model, "search", seed)
    criterion = replace(pair.criterion, tolerable_loss=tolerance(pair, model, baseline, seed))
    conf = PostTrainingQuantConfig(
        accuracy_criterion=criterion, quant_level=level, calibration_sampling_size=ALL_SAMPLES, seed=seed
    )
    calibration, evaluation = pair.calibration(seed), Evaluation(pair, seed, baseline)
    before, start = peak_memory(), time.perf_counter()
    fitted: Any = pared.fit(model, conf, calibration, evaluation, quiet=True)
    seconds, peak = time.perf_counter() - start, peak_memory()
    file = pared.save(fitted, OUT / "search" / f"{name}-{seed}")
    trials = [asdict(trial) for trial in fitted.trials]
    search = loss(criterion, pair.scores(fitted, "search", seed), baseline)
    del fitted
    loaded = pared.load(file.parent, model=pair.load())
    test_baseline = pair.scores(model, "test", seed)
    test = loss(criterion, pair.scores(loaded, "test", seed), test_baseline)
    return Run(
        name=pair.name,
        note=pair.note,
        seed=seed,
        tolerance=criterion.tolerable_loss,
        float_bytes=4 * sum(parameter.numel() for parameter in model.parameters()),
        nbytes=file.stat().st_size,
        evaluations=evaluation.calls,
        fit_seconds=seconds,
        evaluation_seconds=evaluation.seconds / (evaluation.calls - 1),
        peak_before=before,
        peak=peak,
        search_baseline=float(baseline.mean()),
        search=search,
        test_baseline=float(test_baseline.mean()),
        test=test,
        search_met=search.value <= criterion.tolerable_loss,
        test_met=test.value <= criterion.tolerable_loss + 2 * test.error,
        metrics_float=pair.metrics(model, seed),
        metrics=pair.metrics(loaded, seed),
        trials=trials,
        floats=floats(file),
    )


def floats(file: Path) -> dict[str, str]:
    """The tensors of two or more dimensions that an artifact holds in floats, each with its reason."""
    rows = [row for row in pared.inspect(file).rows if row.format.startswith(("float", "bfloat"))]
    return {row.name: row.because for row in rows if row.shape is not None and len(row.shape) > 1}


def in_child(name: str, seed: int, options: argparse.Namespace) -> Run:
    command = [sys.executable, "-m", "bench.search", "--task", name, "--seeds", str(seed)]
    command += ["--threads", str(options.threads), "--level", str(options.level)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return read(json.loads(answer.splitlines()[-1]))


def read(record: Mapping[str, Any]) -> Run:
    """The inverse of `asdict`."""
    return Run(**{**record, "search": Loss(**record["search"]), "test": Loss(**record["test"])})


def show(runs: list[Run]) -> None:
    table = Table(title="The smallest file that keeps the accuracy")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for run in runs:
        table.add_row(
            *(run.name, str(run.seed), f"{run.float_bytes / 1e6:.2f}", f"{run.nbytes / 1e6:.3f}", f"{run.ratio:.2f}"),
            *(str(run.evaluations), f"{run.fit_seconds:.0f}", f"{run.peak / 1e9:.2f}", f"{run.tolerance:.4f}"),
            *(f"{run.search.value:.4f}", f"{run.test.value:.4f} ± {2 * run.test.error:.4f}"),
            "yes" if run.test_met else "NO",
        )
    console = Console(width=WIDTH)
    console.print(table)
    for run in runs:
        pairs = (f"{what} {run.metrics_float[what]:.4f} -> {value:.4f}" for what, value in run.metrics.items())
        console.print(f"{run.name}, seed {run.seed} ({run.note}): {'; '.join(pairs)}", highlight=False)
    mean = math.exp(sum(math.log(run.ratio) for run in runs) / len(runs))
    missed = sum(not run.test_met for run in runs)
    console.print(f"geometric mean of FP32 / file: {mean:.2f}; missed on test: {missed} of {len(runs)}")


def known() -> dict[str, Any]:
    """The records of all runs so far."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=zoo.NAMES, default=zoo.NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", type=int, choices=(0, 1), default=1, help="quant_level: 0 is plain 8 bits")
    parser.add_argument("--force", action="store_true", help="repeat runs that are in the JSON already")
    parser.add_argument("--task", choices=zoo.NAMES, help="(internal) one run in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        print(json.dumps(asdict(run(options.task, options.seeds[0], options.level))))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    records = known()
    wanted = [(name, seed) for name in options.only for seed in options.seeds]
    for name, seed in wanted:
        if options.force or f"{name}/{seed}" not in records:
            print(f"{name}, seed {seed} ...", flush=True)
            found = asdict(in_child(name, seed, options))
            records = {**known(), f"{name}/{seed}": found}  # another process may have added its own
            RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    show([read(records[f"{name}/{seed}"]) for name, seed in wanted])
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
