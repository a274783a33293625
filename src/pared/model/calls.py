"""Calibration data as calls of the model: the one place that decides how a batch becomes arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared.errors import CalibrationError, ParedError
from pared.model.recorded import values
from pared.model.recorded.state import Moment, StateWatch

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the model as it was made, so that it can be made again, on any model of the architecture.

    Args:
        args: the positional arguments, as they were before the call; nobody else writes to them.
        kwargs: the keyword arguments, likewise.
        writes: `forward` changes its arguments: a cache that grows, a tensor that it works on in place.
        state: what the calls change in the model, as it was before this one; None: they change nothing.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writes: bool = False
    state: Moment | None = None

    def on(self, model: Callable[..., Any]) -> Any:
        """The output of a model, or of whatever stands for it; the call and the model stay as they are."""
        args, kwargs = values.copied((self.args, dict(self.kwargs))) if self.writes else (self.args, self.kwargs)
        if self.state is None or not isinstance(model, nn.Module):
            return model(*args, **kwargs)
        with self.state.within(model):
            return model(*args, **kwargs)

    @property
    def task(self) -> str:
        """What tells this call from calls that ask for another result: its texts and flags; empty if it has none.

        >>> Call((1.0, "depth"), {"scaled": True}).task
        "1='depth', scaled=True"
        """
        named = [*((str(place), value) for place, value in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(f"{name}={value!r}" for name, value in named if isinstance(value, str | bool))

    @property
    def side_effects(self) -> str:
        """What the call changes besides giving an output, in words; empty if nothing."""
        what = ["its arguments"] if self.writes else []
        what += [", ".join(self.state.changed[:3])] if self.state is not None else []
        return f"its forward changes {' and '.join(what)}" if what else ""


def smallest_like_first(calls: Sequence[Call]) -> Call:
    """The first call, or the smallest of those that differ from it in sizes only: what one tells, the other does, too.

    >>> calls = [Call((torch.zeros(8, 3),), {}), Call((torch.zeros(2),), {}), Call((torch.zeros(4, 3),), {})]
    >>> smallest_like_first(calls) is calls[2]
    True
    """

    def kind(call: Call) -> object:
        leaves = values.leaves((call.args, dict(call.kwargs)))
        return [(path, (leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else type(leaf)) for path, leaf in leaves]

    def numbers(call: Call) -> int:
        found = [leaf for _, leaf in values.leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
        return sum(tensor.numel() for tensor in found) if all(tensor.numel() for tensor in found) else 1 << 63

    first = calls[0]
    if first.side_effects:
        return first
    alike = [one for one in calls if not one.side_effects and one.task == first.task and kind(one) == kind(first)]
    return min(alike, key=numbers)


def first_samples(call: Call, count: int) -> Call | None:
    """The call with its first samples only; None if nothing shows that its tensors count more samples than these.

    Whether the model then gives what it gave for these samples has to be tried: the first dimension may be another one.

    >>> first_samples(Call((torch.zeros(8, 3), 2), {"mask": torch.ones(8, 3)}), 2).args[0].shape
    torch.Size([2, 3])
    """
    given = (*call.args, *call.kwargs.values())
    tensors = [one for one in given if isinstance(one, Tensor)]
    others = [one for one in given if not isinstance(one, Tensor | bool | int | float | str | None)]
    if call.side_effects or others or not tensors or any(tensor.dim() < 2 for tensor in tensors):
        return None
    if len(set(map(len, tensors))) != 1 or len(tensors[0]) <= count:
        return None

    def first(value: object) -> object:
        return value[:count] if isinstance(value, Tensor) else value

    return Call(tuple(map(first, call.args)), {name: first(value) for name, value in call.kwargs.items()})


Calibration = Iterable[Any] | Callable[[nn.Module], object]
Listener = Callable[[Call, Any], None]  # gets a call, and its output
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def run(
    model: nn.Module,
    calibration: Calibration,
    limit: int,
    name: str = "calib_dataloader",
    listener: Listener | None = None,
) -> int:
    """Call the model on the calibration data, once, without gradients.

    Batches are left as they are: the model gets copies.

    Args:
        model: called as it is, so hooks on it see the calls.
        calibration: an iterable of batches, each a tensor, a tuple or list of arguments, or a dict of keyword
            arguments; or a function that gets the model and calls it.
        limit: reading stops after the batch that reaches this number of samples.
        name: the name of the caller's argument, for messages.
        listener: is told of each call, until `limit` samples were seen: the call, and its output.

    Returns:
        the number of samples seen: the sum over the calls of the first dimension of their first tensor.

    Raises:
        CalibrationError: there are no data, a batch does not fit the model's `forward` or fits it in two ways, or the
            model raised an exception.
    """
    recorder = _Recorder(model, limit, listener)
    with torch.no_grad(), recorder.hooked():
        if callable(calibration) and not isinstance(calibration, nn.Module):
            guarded(lambda: calibration(model), f"{name}(model)")
        else:
            _read(model, calibration, recorder, name)
    if recorder.calls == 0:
        raise CalibrationError(
            "the calibration data are empty: the model was not called",
            where=name,
            remedy="Pass an iterable with at least one batch (an exhausted generator gives none), or a callable that "
            "calls the model.",
        )
    return recorder.samples


def _read(model: nn.Module, calibration: object, recorder: _Recorder, name: str) -> None:
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping, str, bytes)):
        raise CalibrationError(
            f"expected an iterable of batches or a callable, got {type(calibration).__name__}",
            where=name,
            remedy="Put a single batch into a list: [batch].",
        )
    for index, batch in enumerate(calibration):
        where = f"{name}: batch {index}"
        given = bind(model, batch, where)
        args, kwargs = values.copied(given)
        recorder.original = given
        with explaining(model, given, where):
            guarded(lambda args=args, kwargs=kwargs: model(*args, **kwargs), where)  # type: ignore[misc]  # bound now
        if recorder.is_full:
            return


@contextmanager
def explaining(model: nn.Module, given: Arguments, where: str) -> Iterator[None]:
    """Say so where a model that has a decoder fails without inputs for it: what it raises is about others.

    Args:
        model: what is called within this context, by `guarded`.
        given: the arguments of the call.
        where: for messages.

    Raises:
        CalibrationError: the model has raised something.
    """
    try:
        yield
    except CalibrationError as error:
        signature = inspect.signature(model.forward)
        known = {*signature.bind(*given[0], **given[1]).arguments, *given[1]}
        two = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
        if not (two and _of_decoder(signature.parameters)) or _of_decoder(known) or "labels" in known:
            raise
        raise CalibrationError(
            f"there are no inputs for the decoder, without which {error.what}",
            where=where,
            remedy='Pass batches with both, {"input_ids": ..., "decoder_input_ids": ...}, or with "labels", of which '
            "most models make them; on the command line --calib PKG.MOD:OBJ. A text is read by the encoder alone.",
        ) from error.__cause__


def _of_decoder(names: Iterable[str]) -> bool:
    return any(name.startswith("decoder_") for name in names)


def guarded(call: Callable[[], ResultT], where: str) -> ResultT:
    """What a call of the model returns.

    Raises:
        CalibrationError: the model has raised something, which is the cause.
    """
    try:
        return call()
    except ParedError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the model raised {type(error).__name__}: {error}",
            where=where,
            remedy="Call the model on this batch yourself; the traceback above shows where it failed.",
        ) from error


class _Recorder:
    """Hooks on a model that count calls and samples, and tell a listener of calls as they were made."""

    def __init__(self, model: nn.Module, limit: int, listener: Listener | None) -> None:
        self.calls = 0
        self.samples = 0
        self.original: Arguments | None = None  # of the next call: what its arguments are copies of
        self._model, self._limit, self._listener = model, limit, listener
        self._watch = StateWatch(model) if listener is not None else None
        self._running: list[tuple[Arguments, bool, Moment] | None] = []  # a model may call itself

    @property
    def is_full(self) -> bool:
        return self.samples >= self._limit

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Record the calls of the model within this context."""
        # Hooks of the user, which may change arguments and outputs, run between these two: now, and when a call is
        # made again.
        before = self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        after = self._model.register_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            if self._watch is not None:
                self._watch.only_changes()  # what did not change need not be held as long as the calls are

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        original, self.original = self.original, None
        if self._watch is not None and not self.is_full and not values.is_transformed():
            kept = original if original is not None else values.copied((args, kwargs))
            self._running.append((kept, original is not None, self._watch.before()))
        else:
            self._running.append(None)
        self.calls += 1
        self.samples += samples_of(args, kwargs)

    def _after(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        begun = self._running.pop()
        if begun is None or self._listener is None or self._watch is None:
            return
        (kept, is_callers, moment), given = begun, (args, kwargs)
        self._watch.after()
        writes = not values.same(given, kept)
        if is_callers:
            kept = values.copied(kept) if writes else given
        self._listener(Call(*kept, writes, moment), output)


def samples_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of samples in a call: the first dimension of its first tensor; 1 if it has none.

    >>> samples_of((torch.zeros(8, 3),), {}), samples_of((2.0,), {})
    (8, 1)
    """
    leaves = values.leaves((args, dict(kwargs)), whole=(PackedSequence,))
    first = next((leaf for _, leaf in leaves if isinstance(leaf, (Tensor, PackedSequence))), None)
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
