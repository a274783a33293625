"""How long each layer takes on its own, in each of its forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.fitting.search.activations import Candidate
from pared.formats.activation import Activation
from pared.model.calls import Call
from pared.runtime.kernels.machine import without_bfloat16
from pared.runtime.kernels.outliers import columns_of
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import Kernel, Timing
from pared.runtime.stopwatch import times_of


def time_layers(
    candidates: Sequence[Candidate], activations: Mapping[str, Activation], *, in_bfloat16: bool = True
) -> Profile:
    """Time each module in float32, bfloat16 and int8 on a call that calibration saw; equal modules only once.

    Args:
        candidates: the modules.
        activations: how they treat their inputs, by name.
        in_bfloat16: whether it is tried where the processor has it.
    """
    kernels: tuple[Kernel, ...] = ("int8",) if without_bfloat16() or not in_bfloat16 else ("bfloat16", "int8")
    timings: dict[str, Timing] = {}
    known: dict[object, Timing | None] = {}
    for candidate in candidates:
        activation, seen = activations.get(candidate.name), candidate.inputs
        if activation is None or activation.mode == "gather" or seen is None or candidate.layer.missing():
            continue
        dtype = next(iter(candidate.weights.values())).coded.dtype
        shapes = () if seen.call is None else tuple(_shape(x) for x in tree_leaves((seen.call.args, seen.call.kwargs)))
        sizes = tuple(tuple(tensor.shape) for tensor in (*candidate.module.parameters(), *candidate.module.buffers()))
        key = (
            type(candidate.module),
            repr(candidate.module),
            sizes,
            seen.shape,
            shapes,
            dtype,
            activation.mode,
            len(columns_of(activation.outliers)),
        )
        if key not in known:
            forms: dict[Kernel, nn.Module] = {"float32": candidate.decoded()}
            forms |= {kernel: candidate.counterpart(activation, kernel) for kernel in kernels}
            known[key] = measure(forms, seen.shape, dtype, seen.call)
        timing = known[key]
        timings |= {} if timing is None else dict.fromkeys(candidate.activations(activation), timing)
    return Profile(this_machine(), timings)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def measure(
    layers: Mapping[Kernel, nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    call: Call | None = None,
) -> Timing | None:
    """Time one layer in each of its forms, in turn; None if the float layer raises an exception.

    Args:
        layers: the float layer, and its counterparts in int8 and, where it is worth trying, in bfloat16.
        shape: the shape of the input.
        dtype: the type of the input.
        call: the arguments; None: one tensor of random numbers with this shape and type.
    """
    call = call or Call((torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype),), {})
    forms: dict[str, Callable[[], Any] | str] = {kernel: partial(call.on, layer) for kernel, layer in layers.items()}
    times = times_of(forms)
    if times is None:
        return None
    kernels = ("float32", "bfloat16", "int8")
    because = "; ".join(f"no {kernel}: {form}" for kernel, form in forms.items() if isinstance(form, str))
    float32, bfloat16, int8 = (times.get(kernel, times["float32"]) for kernel in kernels)
    return Timing(shape, float32, bfloat16, int8, because)
