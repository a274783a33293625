"""Which tensors of a file are the model: names, copies, and what only training needs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pared import readers
from pared.checkpoints import selection
from pared.checkpoints.selection import Selection, select
from pared.files.disk import open_file
from pared.readers.kinds import list_tensors
from pared.readers.listing import ListedTensor, Listing


def saved(value: object, *, compare: bool = True) -> Selection:
    stream = io.BytesIO()
    torch.save(value, stream)
    with open_file(stream.getvalue()) as file:
        return select(list_tensors(file), compare=compare)


def names(found: Selection) -> list[tuple[str, ...]]:
    return [kept.names for kept in found.kept]


def kinds(found: Selection) -> dict[str, str]:
    return {left.name: left.kind for left in found.left_out}


def test_a_state_dict_is_taken_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    found = saved(model.state_dict())
    assert names(found) == [(name,) for name in model.state_dict()]
    assert found.left_out == ()
    buffers = [kept.name for kept in found.kept if kept.kind == "buffer"]
    assert buffers == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def checkpoint(key: str) -> dict[str, Any]:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {key: model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "weights_of_mine"])
def test_a_checkpoint_is_its_model(key: str) -> None:
    found = saved(checkpoint(key))
    assert names(found) == [("weight",), ("bias",)]
    assert set(kinds(found).values()) == {"optimizer-state"}
    assert len(kinds(found)) == 6  # step, exp_avg, exp_avg_sq of two tensors


def test_models_within_models() -> None:
    found = saved({"model": {"state_dict": nn.Linear(2, 2).state_dict()}, "rng_state": torch.get_rng_state()})
    assert names(found) == [("weight",), ("bias",)]
    assert kinds(found) == {"rng_state": "optimizer-state"}


def test_an_average_of_the_model_is_another_copy() -> None:
    found = saved(
        {"model": nn.Linear(2, 2).state_dict(), "model_ema": nn.Linear(2, 2).state_dict(), "x": torch.ones(1)}
    )
    assert names(found) == [("weight",), ("bias",)]
    assert kinds(found) == {"model_ema/weight": "two-copies", "model_ema/bias": "two-copies", "x": "ballast"}


def test_parts_of_a_model_stay_together() -> None:
    parts = {"encoder": nn.Linear(2, 2).state_dict(), "decoder": nn.Linear(2, 2).state_dict()}
    assert names(saved(parts)) == [("encoder.weight",), ("encoder.bias",), ("decoder.weight",), ("decoder.bias",)]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_wrappers_are_taken_off(prefix: str) -> None:
    assert names(saved({f"{prefix}{name}": torch.ones(1) for name in "ab"})) == [("a",), ("b",)]


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_what_a_part_of_a_model_may_be_called_stays(prefix: str) -> None:
    assert names(saved({f"{prefix}a": torch.ones(1), "b": torch.ones(1)})) == [(f"{prefix}a",), ("b",)]


def test_a_prefix_that_a_model_may_have_stays() -> None:
    assert names(saved({"model.a": torch.ones(1), "model.b": torch.ones(1)})) == [("model.a",), ("model.b",)]


def test_of_two_copies_the_float_one_is_the_model() -> None:
    state = {
        "fp32_model.w": torch.ones(2, 2),
        "_model.w": torch.ones(2, 2, dtype=torch.int8),
        "_model.scale": torch.ones(2),
    }
    found = saved(state)
    assert names(found) == [("w",)]
    assert kinds(found) == {"_model.w": "two-copies", "_model.scale": "two-copies"}


@pytest.mark.parametrize("name", ["upscaler", "gradient_net", "amplifier", "learning", "optics"])
def test_a_model_whose_name_only_sounds_like_training_is_kept(name: str) -> None:
    found = saved({name: nn.Linear(2, 2).state_dict(), "grad_scaler": {"scale": torch.ones(1)}})
    assert names(found) == [("weight",), ("bias",)]
    assert kinds(found) == {"grad_scaler/scale": "optimizer-state"}


def test_slashes_in_a_file_without_dictionaries_are_part_of_a_name(tmp_path: Path) -> None:
    state = {"bert/a/kernel": torch.ones(2, 2), "gradient/kernel": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with readers.open_listing(place) as listing:
            found = select(listing)
        assert names(found) == [(name,) for name in state]
        assert found.left_out == ()


def test_what_is_not_alike_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of a model have one shape: each is compared with its copies, not with all others."""
    compared: list[tuple[str, str]] = []
    equal = selection._equal

    def counted(listing: Listing, one: ListedTensor, other: ListedTensor) -> bool:
        compared.append((one.name, other.name))
        return equal(listing, one, other)

    monkeypatch.setattr(selection, "_equal", counted)
    state = {f"{i}": torch.full((64, 64), float(i)) for i in range(20)}
    assert len(saved(state | {"again": state["3"].clone()}).kept) == 20
    assert compared == [("again", "3")]


def test_tied_tensors_are_kept_once() -> None:
    weight = torch.randn(3, 2)
    found = saved({"a": weight, "b": torch.ones(1), "c": weight})
    assert names(found) == [("a", "c"), ("b",)]
    assert [left.nbytes for left in found.left_out] == [0]


def test_copies_are_kept_once_where_numbers_are_compared() -> None:
    weight = torch.randn(80, 100)
    other = weight.clone()
    other[79, 99] += 1
    state = {"a": weight, "b": weight.clone(), "c": other, "d": other.clone()}
    found = saved(state)
    assert names(found) == [("a", "b"), ("c", "d")]
    assert [(left.name, left.nbytes) for left in found.left_out] == [("b", 32000), ("d", 32000)]
    assert len(saved(state, compare=False).kept) == 4


def test_small_and_flat_tensors_are_not_compared() -> None:
    assert (
        len(
            saved({"a": torch.ones(10_000), "b": torch.ones(10_000), "c": torch.ones(2, 2), "d": torch.ones(2, 2)}).kept
        )
        == 4
    )


def test_pickled_modules_have_dotted_names() -> None:
    held = [
        ListedTensor(f"0/_modules/model/_parameters/{name}", "float32", (2,), 8, name) for name in ("weight", "bias")
    ]
    assert names(select(Listing(tuple(held)))) == [("model.weight",), ("model.bias",)]


def test_what_holds_no_numbers_is_left_out() -> None:
    found = saved({"a": torch.empty(3, device="meta"), "b": torch.ones(1)})
    assert names(found) == [("b",)]
    assert kinds(found) == {"a": "ballast"}


def test_of_the_files_of_a_folder_one_is_the_model() -> None:
    held = ["w", "pytorch_model.bin/w", "onnx/model.onnx/v", "optimizer.pt/state/0/exp_avg"]
    found = select(Listing(tuple(ListedTensor(name, "float32", (2,), 8, name) for name in held)))
    assert names(found) == [("w",)]
    assert sorted(kinds(found).values()) == ["ballast", "optimizer-state", "two-copies"]


def test_the_one_file_of_a_folder_needs_no_name() -> None:
    assert names(select(Listing((ListedTensor("sub/model.pt/state_dict/w", "float32", (2,), 8, "w"),)))) == [("w",)]


def test_nothing_is_nothing() -> None:
    assert select(Listing(())) == Selection((), ())


def test_bits_are_compared_not_numbers() -> None:
    zeros = np.zeros((64, 64), np.float32)
    found = saved({"a": torch.from_numpy(zeros), "b": torch.from_numpy(-zeros)})
    assert len(found.kept) == 2


@pytest.mark.parametrize("holder", [None, "state_dict"])
def test_a_slash_in_a_name_is_no_dictionary(holder: str | None) -> None:
    named = ["conv/3x3.weight", "conv/1x1.weight", "optimizer/weight", "model/weight"]
    state = {name: nn.Parameter(torch.randn(2, 2)) for name in named}
    found = saved(state if holder is None else {holder: state, "optimizer": {"state": {0: {"exp/avg": torch.ones(3)}}}})
    assert names(found) == [(name,) for name in named]
    assert len(found.left_out) == (holder is not None)
    alone = saved({"conv/3x3.weight": torch.ones(2), "conv/1x1.weight": torch.zeros(2)})
    assert names(alone) == [("conv/3x3.weight",), ("conv/1x1.weight",)]
