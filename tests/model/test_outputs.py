"""Outputs as tensors that can be compared, and directions whose covariance is the error's."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from pared.model.outputs import Leaf, leaves_of


def test_which_parts_of_an_output_count() -> None:
    x, ids = torch.randn(2, 3), torch.tensor([1, 2])
    assert [leaf.value is x for leaf in leaves_of(x)] == [True]
    assert len(leaves_of((x, [x, ids]))) == 2
    assert leaves_of(ids) == []
    assert len(leaves_of({"last_hidden_state": x, "past_key_values": (x, x), "logits": x})) == 4, "whatever the name"
    assert [leaf.key[:2] for leaf in leaves_of({"a": x, "b": x}, {"b"})] == [("a", False), ("b", False), ("b", True)]
    assert [leaf.key[:2] for leaf in leaves_of({"a": ids, "b": x[0]}, {"a", "b"})] == [("b", False)], "no logits"
    assert leaves_of({"a": x}, (), "task='b'")[0].key == ("a", False, "task='b'")
    assert len(leaves_of({"nested": {"deep": (x, x)}})) == 2
    assert leaves_of(torch.zeros(0)) == []


def mean_square(leaf: Leaf, error: Tensor, draws: int) -> float:
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(draws):
        direction = torch.zeros(leaf.value.shape)
        leaf.add_probe(direction, 2.0, generator)
        total += float((direction * error).sum() / 2) ** 2
    return total / draws


@pytest.mark.parametrize("at_once", [70, 1000])
@pytest.mark.parametrize("is_logits", [False, True])
@pytest.mark.slow
def test_a_probe_meets_an_error_with_its_energy(is_logits: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.model.outputs._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(1)
    leaf = Leaf(2 * torch.randn(40, 7, generator=generator), is_logits)
    error = 0.01 * torch.randn(40, 7, generator=generator)
    assert mean_square(leaf, error, 4000) == pytest.approx(leaf.error(leaf.value + error), rel=0.15)


def test_what_all_logits_share_is_no_error() -> None:
    leaf = Leaf(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), is_logits=True)
    assert leaf.error(leaf.value + 3.0) == pytest.approx(0.0, abs=1e-9)
    assert leaf.energy() == 5
    assert Leaf(leaf.value).error(leaf.value + 3.0) == pytest.approx(9 * 45)


def test_the_error_of_logits_is_twice_the_divergence() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
    expected = 2 * float((p * (p / q).log()).sum())
    assert Leaf(ours, is_logits=True).error(theirs) == pytest.approx(expected)


@pytest.mark.parametrize("is_logits", [False, True])
@pytest.mark.parametrize("at_once", [1, 8, 21, 1000])
def test_errors_are_the_same_in_pieces(is_logits: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.model.outputs._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    ours[0, 0, 2], ours[1, 1] = -torch.inf, torch.nan  # masked, and broken
    known = [(a.double(), b.double()) for a, b in zip(ours.reshape(-1, 7), theirs.reshape(-1, 7), strict=True)]
    if is_logits:
        pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in known if not bool(a.isnan().any())]
        each = [(a.exp() * (a - b))[a.isfinite()].sum() * 2 for a, b in pairs]
    else:
        each = [(a - b)[a.isfinite()].square().sum() for a, b in known]
    assert Leaf(ours, is_logits).error(theirs) == pytest.approx(float(sum(each)))
    theirs[2, 2, 2] = torch.nan
    assert Leaf(ours, is_logits).error(theirs) == float("inf")
    assert Leaf(torch.tensor(2.0)).error(torch.tensor(3.0)) == 1.0


def test_dataclasses_that_are_mappings_are_understood() -> None:
    @dataclass
    class Output(dict[str, Tensor]):
        def __init__(self) -> None:
            super().__init__(logits=torch.zeros(2, 4))

    assert leaves_of(Output())[0].path == "logits"


def test_dataclasses_name_their_outputs() -> None:
    @dataclass
    class Output:
        boxes: list[Tensor]
        label: str

    assert [leaf.path for leaf in leaves_of(Output([torch.zeros(2), torch.zeros(3)], "cat"))] == ["boxes.0", "boxes.1"]


def test_caches_of_transformers_are_by_products() -> None:
    x = torch.zeros(2, 3)
    found = BaseModelOutputWithPast(last_hidden_state=x, past_key_values=(x, x), hidden_states=(x,))
    assert [leaf.path for leaf in leaves_of(found)] == ["last_hidden_state"]
    alone = BaseModelOutputWithPast(hidden_states=(x,))
    assert [leaf.path for leaf in leaves_of(alone)] == ["hidden_states.0"], "there is nothing else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_masks_are_no_energy(dtype: torch.dtype) -> None:
    leaf = Leaf(torch.tensor([[1.0, torch.finfo(dtype).min], [2.0, torch.nan]], dtype=dtype))
    assert leaf.energy() == 5
    assert leaf.error(leaf.value.nan_to_num(0.0) + 1) == 2
