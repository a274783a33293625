from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared import CalibrationError
from pared.model import calls
from pared.model.recorded import values


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class OneOrTwo(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Words(nn.Module):
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        assert input_ids is not None
        return input_ids


A, B, C = torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (nn.Identity(), A, (A,), {}),
        (nn.Identity(), [A], (A,), {}),
        (nn.Identity(), (A, C), (A,), {}),  # forward takes one: the rest are labels
        (Two(), (A, B), (A, B), {}),
        (Two(), (A, B, C), (A, B), {}),
        (Two(), {"x": A, "y": B}, (), {"x": A, "y": B}),
        (OneOrTwo(), A, (A,), {}),
        (OneOrTwo(), [A], (A,), {}),
        (Words(), {"input_ids": A}, (), {"input_ids": A}),
        (Words(), A, (A,), {}),
    ],
)
def test_what_a_batch_means(model: nn.Module, batch: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound_args, bound_kwargs = calls.bind(model, batch, "batch 0")
    assert [id(a) for a in bound_args] == [id(a) for a in args]
    assert bound_kwargs == kwargs


def test_two_readings_are_shown_and_none_is_guessed() -> None:
    with pytest.raises(CalibrationError) as error:
        calls.bind(Words(), (A, B), "calibration batch 0")
    assert str(error.value) == (
        "calibration batch 0: a tuple of 2 items can be read in two ways: forward(input_ids=item 0, "
        "attention_mask=item 1), or forward(input_ids=item 0) with item 1 as labels\n"
        "  Say which: yield dicts of keyword arguments, or pass a callable that calls the model itself."
    )
    with pytest.raises(CalibrationError, match="can be read in two ways"):
        calls.bind(OneOrTwo(), (A, B), "calibration batch 0")


@pytest.mark.parametrize("batch", [{"z": A}, (A,), {"x": A}])
def test_a_batch_that_does_not_fit_shows_the_signature(batch: object) -> None:
    with pytest.raises(CalibrationError, match=r"calibration batch 4: the batch does not fit forward\(x"):
        calls.bind(Two(), batch, "calibration batch 4")


@pytest.mark.parametrize("empty", [[], iter([]), lambda model: None])
def test_no_data_is_an_error(empty: Any) -> None:
    with pytest.raises(CalibrationError) as error:
        calls.run(nn.Identity(), empty, 10)
    assert error.value.what == "the calibration data are empty: the model was not called"


@pytest.mark.parametrize("wrong", [A, {"x": A}, "text", 3])
def test_what_is_no_loader(wrong: Any) -> None:
    with pytest.raises(CalibrationError) as error:
        calls.run(nn.Identity(), wrong, 10)
    assert str(error.value).startswith("calib_dataloader: expected an iterable of batches or a callable, got ")


def test_reading_stops_at_the_limit() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for i in range(100):
            taken.append(i)
            yield torch.zeros(8, 2)

    assert calls.run(nn.Identity(), batches(), 20) == 24
    assert taken == [0, 1, 2]


def test_a_callable_calls_the_model_itself() -> None:
    def calibrate(model: nn.Module) -> None:
        model(A)
        model(x=A, y=B) if isinstance(model, Two) else model(B)

    assert calls.run(nn.Identity(), calibrate, 100) == 6


def test_an_error_of_the_model_names_the_batch_and_keeps_its_cause() -> None:
    with pytest.raises(CalibrationError, match="calib_dataloader: batch 1: the model raised RuntimeError") as error:
        calls.run(nn.Linear(2, 2), [torch.zeros(1, 2), torch.zeros(1, 3)], 10)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_no_hook_stays_behind() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(CalibrationError):
        calls.run(model, [torch.zeros(1, 3)], 10)
    assert not model._forward_pre_hooks


def test_a_packed_batch_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (3, 7, 2)], enforce_sorted=False)
    seen = []
    model = nn.LSTM(4, 4)
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    assert calls.run(model, [packed], 100) == 3
    assert values.same(seen, [(packed,)])
