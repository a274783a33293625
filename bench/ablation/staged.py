"""Experiments that go through MiniLM's encoder layer by layer: each layer is calibrated behind the compressed ones.

Corrected targets (as in GPTAQ, Li et al. 2025, arXiv 2504.02692, and Qronos, Zhang et al. 2025, arXiv 2505.11695): a
layer whose inputs are Xq in place of X is given weights that come nearest to `W X` on them. Bias correction (Nagel et
al. 2019, arXiv 1906.04721): a layer's bias takes away the mean of the error that rounding its weight adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.ablation.series import Series
from bench.calibrated import Calibrated
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import factor
from pared.fitting.search.free.on_grids import FreeTensor, rounded
from pared.formats.coded import Grid
from pared.model.calls import Call
from pared.model.contents import Contents, Stored
from pared.model.copies import shadow
from pared.model.tensors import find_tensors

_DAMPING = 0.05  # share of the mean second moment


@dataclass(eq=False)
class _Seen:
    """What one Linear saw over all calls: sums over tokens.

    Args:
        moments: Xq^T Xq.
        missing: (X - Xq)^T Xq.
        total: of Xq.
        tokens: how many.
    """

    moments: Tensor
    missing: Tensor
    total: Tensor
    tokens: int = 0


class _Walk:
    """The float model beside one that is compressed layer by layer."""

    def __init__(self, known: Calibrated, contents: Contents) -> None:
        self.original, self.copy = known.model, shadow(known.model)
        self.tensors = {model_tensor.name: model_tensor.tensor for model_tensor in find_tensors(self.copy)}
        self.decoded = {stored.name: stored.coded.decode() for stored in contents.tensors}
        self._calls = known.seen.calls

    def put(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.tensors[name].copy_(value)

    def put_layer(self, linears: Sequence[str]) -> None:
        """Compress the layer that these Linears belong to."""
        layer = linears[0].partition("attention")[0]
        for name, value in self.decoded.items():
            if name.startswith(layer):
                self.put(name, value)

    def start(self) -> list[list[str]]:
        """Compress what is outside of the encoder; the Linears of each of its layers, by name."""
        for name, value in self.decoded.items():
            if not name.startswith("encoder.layer."):
                self.put(name, value)
        linears = [name for name, module in self.copy.named_modules() if isinstance(module, nn.Linear)]
        layers = sorted({int(name.split(".")[2]) for name in linears if name.startswith("encoder.layer.")})
        return [[name for name in linears if name.startswith(f"encoder.layer.{i}.")] for i in layers]

    def look(self, linears: Sequence[str]) -> dict[str, _Seen]:
        """Run both models over the calibration calls."""
        sums: dict[str, _Seen] = {}
        with torch.no_grad():
            for call in self._calls:
                inputs = [_inputs(model, linears, call) for model in (self.original, self.copy)]
                mask = call.kwargs["attention_mask"].bool()
                for name in linears:
                    x, xq = (found[name][mask] for found in inputs)
                    n = x.shape[1]
                    seen = sums.setdefault(name, _Seen(torch.zeros(n, n), torch.zeros(n, n), torch.zeros(n)))
                    seen.moments += xq.T @ xq
                    seen.missing += (x - xq).T @ xq
                    seen.total += xq.sum(0)
                    seen.tokens += len(x)
        return sums


class _SeenAllError(Exception):
    """All that was wanted has been seen."""


def _inputs(model: nn.Module, linears: Sequence[str], call: Call) -> dict[str, Tensor]:
    """Inputs of some Linears in one call, which ends there."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            found[name] = inputs[0]
            if len(found) == len(linears):
                raise _SeenAllError

        return hook

    with contextlib.ExitStack() as stack:
        for name in linears:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(keep(name)).remove)
        with contextlib.suppress(_SeenAllError):
            model(*call.args, **call.kwargs)
    return found


def corrected_targets(known: Calibrated, base: Series, *, own_moments: bool) -> Iterator[Contents]:
    """The base's files with the same steps, and codes for corrected targets.

    Args:
        own_moments: round with the moments of the compressed inputs, in place of those of gradients.
    """
    for contents, point in zip(base.contents, base.chosen, strict=True):
        options = point.choice.options
        free = {one.model_tensor.name: (one, o) for one, o in zip(base.compressor._free, options, strict=True)}
        walk, coded = _Walk(known, contents), {stored.name: stored.coded for stored in contents.tensors}
        for linears in walk.start():
            seen = walk.look(linears)
            for name in (f"{linear}.weight" for linear in linears):
                one, option = free[name]
                if option < len(one.curve.codes):
                    coded[name] = rounded(_corrected(one, seen[name.removesuffix(".weight")], own_moments), option)
                    walk.decoded[name] = coded[name].decode()
            walk.put_layer(linears)
        yield replace(contents, tensors=tuple(replace(s, coded=coded[s.name]) for s in contents.tensors))


def _corrected(one: FreeTensor, seen: _Seen, own_moments: bool) -> FreeTensor:
    damped = seen.moments.double()
    damped += torch.eye(len(damped), dtype=torch.float64) * (_DAMPING * damped.diagonal().mean())
    shift = torch.linalg.solve(damped, seen.missing.double().T).T  # (X - Xq)^T Xq (Xq^T Xq)^-1
    target = one.target
    matrix = (target.matrix.double() + target.matrix.double() @ shift).float().contiguous()
    factored = factor(seen.moments[None]) if own_moments else target.factored
    layout = Blocks() if own_moments else target.layout
    return replace(
        one, target=replace(target, matrix=matrix, factored=factored, layout=layout, absmax=matrix.abs().amax(1))
    )


def corrected_biases(known: Calibrated, base: Series) -> Iterator[Contents]:
    """The base's files, in which each Linear's bias takes away what rounding its weight adds to its mean output."""
    for contents in base.contents:
        walk = _Walk(known, contents)
        for linears in walk.start():
            walk.put_layer(linears)
            for name, seen in walk.look(linears).items():
                error = walk.decoded[f"{name}.weight"] - known.model.get_parameter(f"{name}.weight").detach()
                bias = f"{name}.bias"
                walk.decoded[bias] = walk.decoded[bias] - error @ (seen.total / seen.tokens)
                walk.put(bias, walk.decoded[bias])
        yield with_flat(contents, walk.decoded)


def with_flat(contents: Contents, values: Mapping[str, Tensor]) -> Contents:
    """With other values of parameters of one dimension, in the formats, and with the steps, that they have."""

    def put(stored: Stored) -> Stored:
        coded = stored.coded
        if not is_flat(stored) or stored.name not in values:
            return stored
        if isinstance(coded.format, Grid):
            return replace(stored, coded=coded.format.encode(values[stored.name], coded.parts["step"], coded.view))
        return replace(stored, coded=coded.format.encode(values[stored.name]))

    return replace(contents, tensors=tuple(map(put, contents.tensors)))


def is_flat(stored: Stored) -> bool:
    return stored.kind == "parameter" and len(stored.coded.shape) == 1
