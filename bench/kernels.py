"""The int8 kernels beside float32 and bfloat16: microseconds per call, medians of interleaved runs, two threads.

`python -m bench.kernels [--rounds N] [--json FILE]`. All take and give their own floats: int8 includes turning float32
into codes. Convolutions are measured on contiguous (NCHW) and on channels-last (NHWC) inputs, where the layouts differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.formats.activation import Range
from pared.runtime.kernels import conv, linear
from pared.runtime.kernels.machine import available

THREADS = 2
SPAN = Range(-4.0, 4.0)
COLUMNS = ("float32", "bfloat16", "int8 static", "int8 dynamic")

# rows, inputs, outputs
LINEAR = [
    (1024, 384, 384),
    (1024, 384, 1536),
    (1024, 1536, 384),
    (32, 384, 384),
    (32, 384, 1536),
    (32, 1536, 384),
    (1, 384, 384),
    (1, 1024, 1024),
    (8, 4096, 4096),
]

# name, input, outputs, taps, stride, padding, groups
CONV: list[tuple[str, tuple[int, ...], int, tuple[int, ...], int | tuple[int, ...], int | tuple[int, ...], int]] = [
    ("EfficientNet stem", (1, 3, 224, 224), 32, (3, 3), 2, 1, 1),
    ("EfficientNet depthwise", (1, 32, 112, 112), 32, (3, 3), 1, 1, 32),
    ("EfficientNet depthwise", (1, 144, 56, 56), 144, (5, 5), 2, 2, 144),
    ("EfficientNet 1x1", (1, 96, 56, 56), 24, (1, 1), 1, 0, 1),
    ("EfficientNet 1x1", (1, 24, 56, 56), 144, (1, 1), 1, 0, 1),
    ("EfficientNet 1x1", (1, 1152, 7, 7), 320, (1, 1), 1, 0, 1),
    ("ResNet", (1, 64, 56, 56), 64, (3, 3), 1, 1, 1),
    ("CREPE first", (8, 1, 1024, 1), 1024, (512, 1), (4, 1), (254, 0), 1),
    ("CREPE second", (8, 1024, 128, 1), 128, (64, 1), 1, (32, 0), 1),
    ("speech", (1, 256, 1000), 256, (3,), 1, 1, 1),
    ("speech depthwise", (1, 256, 1000), 256, (7,), 1, 3, 256),
    ("video", (1, 16, 16, 28, 28), 32, (3, 3, 3), 1, 1, 1),
]

Runs = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the medians here, too")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if available():
        raise SystemExit(f"No int8 kernels here: {available()}.")
    print(f"| {'microseconds':<52} |" + "".join(f" {name:>12} |" for name in COLUMNS) + " static / best float |")
    print(f"| {'-' * 52} |" + "".join(f" {'-' * 11}: |" for _ in COLUMNS) + f" {'-' * 18}: |")
    rows: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, runs in cases():
            rows[name] = found = medians(runs, options.rounds)
            ratio = found["int8 static"] / min(found["float32"], found["bfloat16"])
            print(f"| {name:<52} |" + "".join(f" {found[c]:>12.0f} |" for c in COLUMNS) + f" {ratio:>19.2f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def cases() -> Iterator[tuple[str, Runs]]:
    for rows, inputs, outputs in LINEAR:
        yield f"linear {rows} x {inputs} -> {outputs}", linear_runs(rows, inputs, outputs)
    for name, shape, outputs, taps, stride, padding, groups in CONV:
        title = f"{name} {'x'.join(map(str, shape[1:]))} -> {outputs}, {'x'.join(map(str, taps))}"
        geometry = conv.Geometry.of(taps, stride, padding, 1, groups)
        x, weight = torch.randn(shape), torch.randn(outputs, shape[1] // groups, *taps) * 0.05
        yield title, conv_runs(x, weight, geometry)
        if len(taps) > 1 and shape[1] > 1:
            layout = (torch.channels_last, torch.channels_last_3d)[len(taps) - 2]
            last = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
            yield f"{title} NHWC", conv_runs(*last, geometry)


def linear_runs(rows: int, inputs: int, outputs: int) -> Runs:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs) * 0.05, torch.randn(outputs)
    packed = linear.pack(*quantized(weight))
    half = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    return {
        "float32": lambda: F.linear(x, weight, bias),
        "bfloat16": lambda: F.linear(*half),
        "int8 static": lambda: linear.static(x, packed, bias, SPAN),
        "int8 dynamic": lambda: linear.dynamic(x, packed, bias),
    }


def conv_runs(x: Tensor, weight: Tensor, geometry: conv.Geometry) -> Runs:
    bias = torch.randn(len(weight))
    packed = conv.pack(*quantized(weight), geometry)
    half = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    moves = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return {
        "float32": lambda: convolve(x, weight, bias, *moves),
        "bfloat16": lambda: convolve(*half, *moves),
        "int8 static": lambda: conv.static(x, packed, bias, SPAN),
        "int8 dynamic": lambda: conv.dynamic(x, packed, bias),
    }


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and steps by rounding each row to the nearest of 255 values."""
    step = weight.flatten(1).abs().amax(1) / 127
    return (weight / step.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), step


def medians(runs: Runs, rounds: int, warmup: int = 3) -> dict[str, float]:
    """Microseconds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(rounds + warmup):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if attempt >= warmup:
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
