"""Calibration data as calls of the model: the one place that decides how a batch becomes arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from pared.errors import CalibrationError, ParedError


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of the model, in tensors that nobody else writes to, so that it can be repeated."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Calibration = Iterable[Any] | Callable[[nn.Module], object]


def run(model: nn.Module, calibration: Calibration, limit: int, name: str = "calib_dataloader") -> int:
    """Call the model on the calibration data, once, without gradients.

    Args:
        model: called as it is, so hooks on it see the calls.
        calibration: an iterable of batches, each a tensor, a tuple or list of arguments, or a dict of keyword
            arguments; or a function that gets the model and calls it.
        limit: reading stops after the batch that reaches this number of samples.
        name: the name of the caller's argument, for messages.

    Returns:
        the number of samples seen: the sum over the calls of the first dimension of their first tensor.

    Raises:
        CalibrationError: there are no data, a batch does not fit the model's `forward` or fits it in two ways, or the
            model raised an exception.
    """
    counter = _SampleCounter()
    handle = model.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        with torch.no_grad():
            if callable(calibration) and not isinstance(calibration, nn.Module):
                _guarded(lambda: calibration(model), f"{name}(model)")
            else:
                _read(model, calibration, limit, counter, name)
    finally:
        handle.remove()
    if counter.calls == 0:
        raise CalibrationError(
            "the calibration data are empty: the model was not called",
            where=name,
            remedy="Pass an iterable with at least one batch (an exhausted generator gives none), or a callable that "
            "calls the model.",
        )
    return counter.samples


def _read(model: nn.Module, calibration: object, limit: int, counter: _SampleCounter, name: str) -> None:
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping, str, bytes)):
        raise CalibrationError(
            f"expected an iterable of batches or a callable, got {type(calibration).__name__}",
            where=name,
            remedy="Put a single batch into a list: [batch].",
        )
    for index, batch in enumerate(calibration):
        where = f"{name}: batch {index}"
        args, kwargs = bind(model, batch, where)
        _guarded(lambda args=args, kwargs=kwargs: model(*args, **kwargs), where)  # type: ignore[misc]  # bound now
        if counter.samples >= limit:
            return


def _guarded(call: Callable[[], object], where: str) -> None:
    """Turn whatever the model raises into an error that names the batch; the original is its cause."""
    try:
        call()
    except ParedError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the model raised {type(error).__name__}: {error}",
            where=where,
            remedy="Call the model on this batch yourself; the traceback above shows where it failed.",
        ) from error


class _SampleCounter:
    """A forward pre-hook that counts calls and samples."""

    def __init__(self) -> None:
        self.calls = 0
        self.samples = 0

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.samples += samples_of(args, kwargs)


def samples_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of samples in a call: the first dimension of its first tensor; 1 if it has none.

    >>> samples_of((torch.zeros(8, 3),), {}), samples_of((2.0,), {})
    (8, 1)
    """
    leaves = tree_leaves((args, dict(kwargs)), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    first = next((leaf for leaf in leaves if isinstance(leaf, (Tensor, PackedSequence))), None)
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    return first.shape[0] if first is not None and first.dim() > 0 else 1


def bind(model: nn.Module, batch: object, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for.

    All k items of a tuple or list are arguments if `forward` requires at least k. Items beyond what `forward` can take
    are labels, and are left out.

    Raises:
        CalibrationError: `forward` requires fewer than k but could take more than that, so the other items could be
            arguments or labels; or the batch does not fit at all.

    >>> bind(nn.Linear(2, 2), (torch.zeros(1, 2), "label"), "batch 0")
    ((tensor([[0., 0.]]),), {})
    """
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        return (), _check_fit(signature, (), dict(batch), where)[1]
    if isinstance(batch, (Tensor, PackedSequence)) or not isinstance(batch, (tuple, list)):
        return _check_fit(signature, (batch,), {}, where)
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    most = len(positional)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        most = max(most, len(batch))
    items = tuple(batch)
    if len(items) > 1 and required < len(items) and most > max(required, 1):
        raise _two_readings(items, [p.name for p in positional], required, where)
    return _check_fit(signature, items[: max(most, 1)], {}, where)


def _two_readings(items: tuple[Any, ...], names: list[str], required: int, where: str) -> CalibrationError:
    names = names + [f"argument {i}" for i in range(len(names), len(items))]
    taken = max(required, 1)
    whole = ", ".join(f"{name}=item {i}" for i, name in enumerate(names[: len(items)]))
    part = ", ".join(f"{name}=item {i}" for i, name in enumerate(names[:taken]))
    rest = " and ".join(f"item {i}" for i in range(taken, len(items)))
    return CalibrationError(
        f"a {type(items).__name__} of {len(items)} items can be read in two ways: forward({whole}), or forward({part}) "
        f"with {rest} as labels",
        where=where,
        remedy="Say which: yield dicts of keyword arguments, or pass a callable that calls the model itself.",
    )


def _check_fit(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationError(
            f"the batch does not fit forward{signature}: {error}",
            where=where,
            remedy="Yield what forward takes: a tensor, a tuple of its arguments, or a dict of keyword arguments.",
        ) from error
    return args, kwargs
