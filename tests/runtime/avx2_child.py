"""Started by test_machine.py with oneDNN limited to AVX2: prints, as JSON, what int8 products come to there."""

import json
import sys

import torch

from pared.formats.activation import Range
from pared.runtime.kernels import conv, linear
from pared.runtime.kernels.machine import available, exact_products, levels_for
from tests.runtime import reference


def error(fast: torch.Tensor, slow: torch.Tensor) -> float:
    return float((fast - slow).abs().max() / slow.abs().max())


def main() -> None:
    torch.manual_seed(0)
    span = Range(0.0, 1.0)
    largest, small = torch.full((5, 66), 127, dtype=torch.int8), torch.full((5, 66), 64, dtype=torch.int8)
    mixed = torch.randint(-127, 128, (5, 66), dtype=torch.int8)
    step, x = torch.rand(5) + 0.1, torch.ones(3, 66)
    noise = torch.randn(3, 66)
    report: dict[str, object] = {
        "available": available(),
        "exact": exact_products(),
        "levels": [levels_for(codes) for codes in (largest, small, mixed)],
    }
    errors = {}
    for name, codes in (("largest", largest), ("small", small), ("mixed", mixed)):
        packed = linear.pack(codes, step)
        levels = packed.levels
        slow = reference.linear(x, codes, step, span=span, levels=levels)
        errors[f"linear static {name}"] = error(linear.static(x, packed, None, span), slow)
        slow = reference.linear(noise, codes, step, levels=levels)
        errors[f"linear dynamic {name}"] = error(linear.dynamic(noise, packed), slow)
    for dimensions in (1, 2, 3):
        for groups in (1, 8):
            codes = torch.full((8, 8 // groups, *[3] * dimensions), 127, dtype=torch.int8)
            geometry = conv.Geometry.of(codes.shape[2:], padding=1, groups=groups)
            filters = conv.pack(codes, torch.ones(8), geometry)
            x = torch.ones(2, 8, *[5] * dimensions)
            slow = reference.convolution(x, codes, torch.ones(8), geometry, span=span, levels=filters.levels)
            errors[f"conv{dimensions}d groups {groups}"] = error(conv.static(x, filters, None, span), slow)
    report["errors"] = errors
    # What goes wrong where this is ignored: all 8 bits against the largest weights.
    careless = linear.PackedLinear(**{**vars(linear.pack(largest, step)), "levels": 255})
    full = linear.static(torch.ones(3, 66), careless, None, span)
    report["careless"] = error(full, reference.linear(torch.ones(3, 66), largest, step, span=span))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
