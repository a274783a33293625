import copy
import re

import pytest
import torch
from torch import nn

import pared
from pared import ModelError
from pared.formats import views
from pared.model import tensors
from pared.model.checks import supported_tensors
from pared.model.copies import clone_structure, shadow
from pared.model.tensors import find_tensors


class Tied(nn.Module):
    def __init__(self, *, one_object: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight if one_object else nn.Parameter(self.table.weight.detach())


@pytest.mark.parametrize("one_object", [True, False])
def test_tied_tensors_are_one_with_both_names(one_object: bool) -> None:
    (tensor,) = find_tensors(Tied(one_object=one_object))
    assert tensor.names == ("table.weight", "head.weight")
    assert len(tensor.objects) == (1 if one_object else 2)


def test_every_registered_tensor_is_found_once() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {tensor.name for tensor in find_tensors(model)} == set(named)


def test_persistence_is_seen() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2, 2))
    module.register_buffer("made", torch.ones(3, 3), persistent=False)
    assert {tensor.name: (tensor.kind, tensor.persistent) for tensor in find_tensors(module)} == {
        "kept": ("buffer", True),
        "made": ("buffer", False),
    }


def test_a_clone_has_new_tensors_and_the_original_keeps_its_own() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clone = clone_structure(model, torch.zeros_like)
    assert all(bool((tensor == 0).all()) for tensor in clone.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    out, _ = clone[0](torch.randn(5, 1, 3))
    assert torch.equal(out, torch.zeros_like(out)), "the clone's LSTM must run on the clone's weights"


def test_a_clone_of_a_weight_normed_layer_works() -> None:
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    layer(torch.ones(1, 3))
    clone = clone_structure(layer, lambda tensor: tensor.detach().clone())
    assert torch.equal(clone(torch.ones(1, 3)), layer(torch.ones(1, 3)))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(3)


def nan_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[1, 0] = float("nan")
    return model


def infinite_model() -> nn.Module:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = float("inf")
    return model


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("odd", tensor)
    return model


def scripted() -> object:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "weights.pt", "expected a torch.nn.Module, got str"),
        (lambda: nn.Linear, "expected a torch.nn.Module, got type\n  Pass an instance of the model, not its class"),
        (Lazy, "inner: has lazy parameters"),
        (scripted, "is a TorchScript module"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight: is on the meta device: it holds no numbers"),
        (nan_model, "1.weight: holds NaN (1 of 4 values, the first at [1, 0])"),
        (
            lambda: with_buffer(torch.eye(2).to_sparse()),
            "odd: has a type or layout that no format can hold (torch.float32, torch.sparse_coo)",
        ),
        (
            lambda: with_buffer(torch.ones(2).to(torch.float8_e4m3fn)),
            "odd: has a type or layout that no format can hold",
        ),
        (infinite_model, "bias: holds Inf (1 of 2 values, the first at [1])"),
    ],
)
def test_what_cannot_be_compressed_is_refused_by_name(make, words: str) -> None:  # type: ignore[no-untyped-def]  # any
    with pytest.raises(ModelError, match=re.escape(words)) as error:
        supported_tensors(make())
    assert error.value.remedy


def test_models_quantized_by_others_are_refused() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        ModelError, match=re.escape("0: is already quantized, or prepared for it (torch.ao.nn.quantized")
    ):
        supported_tensors(model)


def test_a_deep_copy_is_still_what_torch_makes_it() -> None:
    model = nn.Linear(2, 2)
    assert torch.equal(copy.deepcopy(model).weight, clone_structure(model, lambda t: t.detach().clone()).weight)


@pytest.mark.parametrize("one_object", [True, False])
def test_a_copy_has_the_same_tensors(one_object: bool) -> None:
    found = find_tensors(Tied(one_object=one_object))
    copied = found.in_copy(shadow(found.model))
    assert [tensor.names for tensor in copied] == [tensor.names for tensor in found]
    assert [tensor.view for tensor in copied] == [tensor.view for tensor in found]
    for tensor, original in zip(copied, found, strict=True):
        assert tensor.module is copied.model.get_submodule(tensor.name.rpartition(".")[0])
        assert len(tensor.objects) == len(original.objects)
        assert all(copied.names[id(an_object)] == tensor.name for an_object in tensor.objects)
        assert tensor.tensor.data_ptr() != original.tensor.data_ptr()
        assert torch.equal(tensor.tensor, original.tensor)


def test_fit_looks_at_each_tensor_of_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From calibration to the assembled model, all stages take the tensors and views that were found at the entry."""
    seen: list[str] = []

    def view_of(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> views.View:
        seen.append(attribute)
        return views.view_of(module, attribute, shape)

    monkeypatch.setattr(tensors, "view_of", view_of)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    pared.fit(model, calib_dataloader=[torch.randn(8, 8) for _ in range(2)], quiet=True)
    assert seen == [
        *("weight", "bias"),
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        *("weight", "bias"),
    ]
