"""States that are larger than they should be, each for one reason, and what is to be found in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from examples import why_bigger
from torch import Tensor, nn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Weights like trained ones."""
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    """Weights at random, biases at zero, norms at one: as any new model is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Embedding(500, 64), nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64), nn.LSTM(64, 64))
        model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def checkpoint(optimizer: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    model = network()
    steps = optimizer(model.parameters(), **options)
    torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()
    steps.step()
    return {"model": model.state_dict(), "optimizer": steps.state_dict(), "epoch": 3}


def on_levels(weight: Tensor, levels: int, group: int, zero_point: bool = False) -> Tensor:
    """Fake-quantized, each group of neighbours for itself."""
    groups = weight.reshape(-1, group)
    if zero_point:
        low = groups.amin(1, keepdim=True)
        step = (groups.amax(1, keepdim=True) - low) / (levels - 1)
        return (torch.round((groups - low) / step) * step + low).reshape(weight.shape)
    step = groups.abs().amax(1, keepdim=True) / (levels // 2)
    return (torch.round(groups / step) * step).reshape(weight.shape)


def per_channel(weight: Tensor, axis: int) -> Tensor:
    others = [i for i in range(weight.ndim) if i != axis]
    step = weight.abs().amax(others, keepdim=True) / 127
    return torch.round(weight / step) * step


def side_by_side() -> dict[str, Tensor]:
    """A float weight with its int8 copy in the same module."""
    weight = drawn(200, 100)
    return {"fc.weight": weight, "fc.weight_int8": torch.round(weight / weight.abs().max() * 127).to(torch.int8)}


def with_halves() -> dict[str, Tensor]:
    model = {f"{i}.weight": drawn(100, 100, seed=i) for i in range(3)}
    return {**{f"master.{k}": v for k, v in model.items()}, **{f"half.{k}": v.bfloat16() for k, v in model.items()}}


WEIGHT, TABLE = drawn(200, 100), drawn(1000, 64, seed=1)
LONG = drawn(100, 256, seed=3)
BIG = drawn(1000, 64, seed=2)
SPARSE = torch.where(WEIGHT.abs() < 0.05, torch.zeros(()), WEIGHT)


def grouped(levels: int, group: int, zero_point: bool) -> dict[str, Tensor]:
    return {"a": on_levels(LONG, levels, group, zero_point), "b": TABLE}


# Each: what torch.save is given, the kinds that are found with their bytes, and a name that is among theirs.
CASES: dict[str, tuple[Callable[[], Any], dict[str, int], str]] = {
    "the float and the int8 half of INC's wrapper": (
        lambda: why_bigger.wrapped(nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64))),
        {"two-copies": 4 * (64 * 128 * 2 + 128 + 64 + 256)},
        "fp32_model.0.weight",
    ),
    "int8 beside float in one module": (side_by_side, {"two-copies": 80_000}, "fc.weight"),
    "a master copy in float32 of bfloat16": (with_halves, {"two-copies": 120_000}, "master.0.weight"),
    "an average of the model beside it": (
        lambda: {"state_dict": {"w": WEIGHT}, "ema": {"w": WEIGHT + 0.01 * drawn(200, 100, seed=5)}},
        {"two-copies": 80_000},
        "ema/w",
    ),
    "Adam": (lambda: checkpoint(torch.optim.AdamW), {"optimizer-state": 783_440}, "optimizer/state/0/exp_avg"),
    "SGD with momentum": (
        lambda: checkpoint(torch.optim.SGD, lr=0.1, momentum=0.9),
        {"optimizer-state": 391_680},
        "optimizer/state/0/momentum_buffer",
    ),
    "rows of a larger tensor": (
        lambda: {"a": BIG[:100], "b": BIG[500:520], "c": WEIGHT},
        {"view-of-larger-storage": 4 * 64 * 880},
        "a",
    ),
    "an output layer that was tied": (
        lambda: {"embed_tokens.weight": TABLE, "fc.weight": WEIGHT, "lm_head.weight": TABLE.clone()},
        {"untied": 256_000},
        "lm_head.weight",
    ),
    "a layer that was copied": (
        lambda: {"a.weight": WEIGHT, "b.weight": WEIGHT.clone(), "c.weight": TABLE},
        {"duplicate": 80_000},
        "b.weight",
    ),
    "doubles": (lambda: {"a": WEIGHT.double(), "b": TABLE.double()}, {"wide-float": 672_000}, "a"),
    "float32 that is float16": (lambda: {"a": WEIGHT.half().float(), "b": TABLE}, {"wide-float": 80_000}, "a"),
    "float32 that is bfloat16": (lambda: {"a": WEIGHT.bfloat16().float(), "b": TABLE}, {"wide-float": 80_000}, "a"),
    "small numbers in int64": (
        lambda: {"index": torch.arange(10_000) % 300, "b": TABLE},
        {"wide-int": 80_000},
        "index",
    ),
    "a mask of ones": (lambda: {"mask": torch.ones(200, 100), "b": TABLE}, {"zeros": 80_000}, "mask"),
    "a pruned weight": (lambda: {"a": SPARSE, "b": TABLE}, {"zeros": 80_000}, "a"),
    **{
        f"{levels} levels in groups of {group}, {'with' if zero else 'without'} a zero point": (
            partial(grouped, levels, group, zero),
            {"fake-quantized": 102_400},
            "a",
        )
        for levels in (3, 15, 255)
        for group in (32, 64, 128)
        for zero in (False, True)
    },
    "int8 with a step for each row": (
        lambda: {"a": per_channel(WEIGHT, 0), "b": TABLE},
        {"fake-quantized": 80_000},
        "a",
    ),
    "int8 with a step for each column": (
        lambda: {"a": per_channel(drawn(64, 32, 4, 4), 1), "b": TABLE},
        {"fake-quantized": 131_072},
        "a",
    ),
    "an LSTM that stayed in float": (
        lambda: why_bigger.own_save(nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 128))),
        {"left-in-float": 4 * (512 * 64 + 512 * 128)},
        "1.weight_hh_l0",
    ),
    "codes and scales of GPTQ": (
        lambda: {
            "l.qweight": torch.randint(-(2**31), 2**31 - 1, (128, 512), dtype=torch.int32),
            "l.qzeros": torch.full((8, 64), 0x77777777, dtype=torch.int32),
            "l.scales": drawn(8, 512).abs().half(),
            "l.g_idx": torch.arange(1024, dtype=torch.int32) // 128,
            "embed.weight": per_channel(WEIGHT, 0),  # where another cause would be found
        },
        {"quantized-already": 4 * (128 * 512 + 8 * 64)},
        "l.qweight",
    ),
    "storages that nothing refers to": (
        lambda: {"w": WEIGHT, "kept": drawn(100, 100).untyped_storage()},
        {"ballast": 40_000},
        "(data/1)",
    ),
    "images beside the model": (
        lambda: {"w": WEIGHT, "images": b"x" * 10**5},
        {"ballast": 100_000},
        "(pickle)",
    ),
    "tensors of the training loop": (
        lambda: {"state_dict": {"w": WEIGHT}, "losses": drawn(10_000)},
        {"ballast": 40_000},
        "losses",
    ),
}
