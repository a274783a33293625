"""A model whose columns have scales: its state dict, and all ways of keeping and moving it."""

import copy
import pickle
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared.artifact.envelope import open_records
from pared.artifact.parse import parse_index
from pared.errors import ConfigError, ModelError
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid, log_step
from pared.model.contents import Contents, Decision, Stored
from pared.runtime.kernels import linear
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.record import contents_of
from pared.targets.conversion import Held, converted
from pared.targets.table import TARGETS
from tests.runtime.test_groups import same, saved
from tests.runtime.test_merging import graph_of, lost

TOKENS = torch.arange(12).reshape(3, 4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 50, bias=False)).eval()


def scaled(tensor: Tensor, codes: Literal["int8", "int16"] = "int8") -> Coded:
    scale = log_step(torch.exp2(torch.arange(tensor.shape[1]) % 9 / 2 - 2))
    fmt = Grid(codes, scaled=True)
    step = log_step((tensor.float() / scale).abs().amax(1) / fmt.limit)
    return fmt.encode(tensor, step, None, scale)


def contents(
    modules: dict[str, Activation] | None = None,
    codes: Literal["int8", "int16"] = "int8",
    dtype: torch.dtype = torch.float32,
) -> Contents:
    found = []
    for key, tensor in model().to(dtype).named_parameters():
        coded = scaled(tensor.detach(), codes) if tensor.dim() > 1 else Grid(codes).encode(tensor, tensor.abs().float())
        found.append(Stored((key,), "parameter", coded, Decision(key, "grid", 4.0, "")))
    return Contents(tuple(found), modules or {}, {"pared": "0"})


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("codes", ["int8", "int16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_on_what_it_decodes_to_and_is_kept_everywhere(
    dtype: torch.dtype, codes: Literal["int8", "int16"], memory: Literal["fast", "small"], tmp_path: Path
) -> None:
    ours = contents(codes=codes, dtype=dtype)
    floats = model().to(dtype)
    floats.load_state_dict({stored.name: stored.coded.decode() for stored in ours.tensors})
    expected = floats(TOKENS)
    quantized = pared.load(saved(ours, tmp_path), model=model().to(dtype), memory=memory)
    assert torch.equal(quantized(TOKENS), expected)
    for other in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(TOKENS), expected)
        kept = contents_of(other)
        if (dtype, codes) != (torch.bfloat16, "int16"):  # where several codes decode to the same number
            assert same(kept, ours)
        assert all(
            torch.equal(a.coded.decode(), b.coded.decode()) for a, b in zip(kept.tensors, ours.tensors, strict=True)
        )
    (tmp_path / "again").mkdir()
    quantized.save(tmp_path / "again")
    assert torch.equal(pared.load(tmp_path / "again", model=model().to(dtype), memory=memory)(TOKENS), expected)
    with open_records(tmp_path / "again" / "best_model.pt") as records:
        assert {entry.label for entry in parse_index(records).entries} == {f"grid {codes}, scaled", f"grid {codes}"}


def test_a_state_dict_shows_the_scales_and_takes_them_back(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents(), tmp_path), model=model())
    state = {key: tensor.clone() for key, tensor in quantized.state_dict().items()}
    assert {key for key in state if key.startswith("3.")} == {"3.weight", "3.weight_step", "3.weight_scale"}
    changed = state | {"3.weight_scale": state["3.weight_scale"] * 2}
    expected = quantized(TOKENS)
    quantized.load_state_dict(changed)
    assert not torch.equal(quantized(TOKENS), expected)
    assert all(torch.equal(tensor, changed[key]) for key, tensor in quantized.state_dict().items())
    floats = pared.load(tmp_path, model=model())
    floats.load_state_dict(model().state_dict())
    assert torch.equal(floats(TOKENS), model()(TOKENS))
    matrices = {key: tensor for key, tensor in state.items() if "bias" not in key}
    floats.load_state_dict(matrices, strict=False)  # from floats back to codes with scales
    found = {stored.name: stored.coded.decode() for stored in contents_of(floats).tensors}
    assert all(torch.equal(found[one.name], one.coded.decode()) for one in contents().tensors if "bias" not in one.name)


def test_scales_of_another_number_of_columns_are_refused(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents(), tmp_path), model=model())
    state = dict(quantized.state_dict())
    state["3.weight_scale"] = state["3.weight_scale"][:7]
    with pytest.raises(RuntimeError, match=r"3.weight: expected int8 or int16 codes with 3.weight_step"):
        quantized.load_state_dict(state)


def test_a_weight_that_was_changed_is_no_longer_saved(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents(), tmp_path), model=model())
    with torch.no_grad():
        quantized[3].weight[0, 0] += 1
    with pytest.raises(ModelError, match="was changed after it was compressed"):
        quantized.save(tmp_path / "again")


def test_a_runtime_without_scales_refuses_them() -> None:
    coded = scaled(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    numbers = {name: part.numpy() for name, part in coded.parts.items()}
    held = Held(("w",), (64, 64), "float32", frozenset(["linear"]), "rows", (64, 64), lambda: numbers)
    with pytest.raises(ConfigError, match="w has scales of columns, which its formats lack"):
        converted([held], TARGETS["gguf"], {}, None, {})


def one_layer(activation: Activation, folder: Path) -> tuple[Contents, nn.Module]:
    """The model with its first product in int8."""
    ours = contents({"1": activation})
    return ours, pared.load(saved(ours, folder), model=model())


# Times the scales all are within -3 and 3, but for two columns.
INPUTS = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).mul_(0.7).clamp_(-3, 3)
INPUTS[:, 60], INPUTS[:, 63] = 7, -10
INPUTS /= scaled(torch.ones(1, 64)).parts["scale"]
MODES = (
    Activation("dynamic"),
    Activation("static", -12.0, 12.0),
    Activation("static", -3.0, 3.0, outliers=((60, 2), (63, -3))),
)


@pytest.mark.parametrize("activation", MODES, ids=str)
def test_products_of_codes_scale_their_input(activation: Activation, tmp_path: Path) -> None:
    ours, quantized = one_layer(activation, tmp_path)
    layer = quantized[1]
    assert isinstance(layer, Counterpart)
    coded = next(one.coded for one in ours.tensors if one.name == "1.weight")
    found = layer(INPUTS)
    packed = linear.pack(coded.parts["codes"], coded.parts["step"], activation.outliers)
    scaled_input = INPUTS * coded.parts["scale"]
    if activation.mode == "dynamic":
        expected = linear.dynamic(scaled_input, packed, layer.bias)
    else:
        expected = linear.static(scaled_input, packed, layer.bias, activation.span, activation.outliers)
    assert torch.equal(found, expected)
    assert lost(found, F.linear(INPUTS, coded.decode(), layer.bias)) < 1e-3
    assert torch.equal(layer.weight, coded.decode())
    assert same(contents_of(quantized), ours)
    state = quantized.state_dict()
    assert torch.equal(state["1.weight_scale"], coded.parts["scale"])
    half = copy.deepcopy(quantized).bfloat16()
    assert half.state_dict()["1.weight_scale"].dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(quantized))[1](INPUTS), found)
    quantized.load_state_dict(state | {"1.weight_scale": state["1.weight_scale"] * 2})
    assert not torch.equal(layer(INPUTS), found)


@pytest.mark.parametrize("activation", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_few_bits_are_scaled_in_float32(dtype: torch.dtype, activation: Activation, tmp_path: Path) -> None:
    _, quantized = one_layer(activation, tmp_path)
    given = INPUTS.to(dtype)
    found = quantized[1](given)
    assert found.dtype == dtype
    assert torch.equal(found, quantized[1](given.float()).to(dtype))


def test_a_scaled_input_may_be_beyond_float16(tmp_path: Path) -> None:
    _, quantized = one_layer(Activation("dynamic"), tmp_path)
    largest = int(quantized[1].pared_scale("weight").argmax())
    given = torch.zeros(2, 64, dtype=torch.float16)
    given[0, largest], given[1, largest] = 40000.0, 1.0
    assert float(given[0, largest]) * float(quantized[1].pared_scale("weight").max()) > torch.finfo(torch.float16).max
    found = quantized[1](given * 2**-6)
    larger = quantized[1](given)
    exact = F.linear(given.float(), quantized[1].weight, quantized[1].bias)
    assert found.isfinite().all()
    small = exact.abs() < torch.finfo(torch.float16).max
    assert larger[small].isfinite().all()
    assert lost(larger[small].float(), exact[small]) < 1e-3


@pytest.mark.parametrize("activation", MODES, ids=str)
def test_graphs_scale_the_input_as_modules_do(activation: Activation, tmp_path: Path) -> None:
    _, quantized = one_layer(activation, tmp_path)
    with torch.no_grad():
        expected = quantized(TOKENS)
        _, run = graph_of(quantized, {"input": TOKENS})
        assert lost(run({"input": TOKENS}), expected) < 1e-6  # ties are rounded elsewhere, see `few.product`


def test_small_memory_holds_codes_and_scales(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents(), tmp_path), model=model(), memory="small")
    assert all(isinstance(quantized[i], Counterpart) for i in (0, 1, 3))
    floats = sum(one.nbytes for one in quantized.parameters())
    assert floats < sum(one.nbytes for one in model().parameters()) / 10
