"""The quantized model: what a user may do with it, and what must not happen to the original."""

import copy
import io
import math
import pickle
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import ModelError, PostTrainingQuantConfig, Rule
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.record import record_of
from tests.ratios import snr
from tests.runtime.copies import copies

pytestmark = pytest.mark.slow  # almost every test here fits a whole model


class Padded(nn.Conv2d):
    """A subclass with its own forward, as in EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


class Everything(nn.Module):
    """Many kinds of layers, a tied table, a raw parameter, a functional use and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2048, 32)
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.conv = Padded(1, 4, 3)
        self.up = nn.ConvTranspose2d(4, 2, 2, groups=2)
        self.norm = nn.LayerNorm(32)
        self.batch_norm = nn.BatchNorm2d(4)
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 2048, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("positions", torch.arange(16), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids + 0 * self.positions[: ids.shape[1]])
        h = self.gru(self.lstm(h)[0])[0]
        h = h + self.attention(h, h, h, need_weights=False)[0]
        image = self.up(self.batch_norm(self.conv(h[:, None])))
        h = self.norm(h + image.mean((1, 2, 3))[:, None, None]) @ self.mix
        return self.head(h)


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, 2048, (batch, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module", params=["weight_only", "dynamic", "static", "auto"])
def small(request: pytest.FixtureRequest, original: Everything) -> Everything:
    conf = PostTrainingQuantConfig(approach=request.param, quant_level=0)
    return pared.fit(original, conf, [ids()])


def test_outputs_stay_close(original: Everything, small: Everything) -> None:
    with torch.no_grad():
        assert snr(original(ids()), small(ids())) > 25


def test_the_original_is_untouched() -> None:
    torch.manual_seed(0)
    model = Everything().train()
    model.head.weight.requires_grad_(False)
    model.lstm.register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(tensor) for name, tensor in model.named_parameters()}
    pared.fit(
        model,
        PostTrainingQuantConfig(approach="static"),
        [ids()],
        eval_func=lambda m: float(m(ids()).detach().mean()),
    )
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model.head.weight.requires_grad
    assert [len(m._forward_hooks) for m in model.modules() if m._forward_hooks] == [1]
    assert not any(m._forward_pre_hooks or m._state_dict_hooks for m in model.modules())
    assert type(model) is Everything


def test_it_is_of_the_original_class(original: Everything, small: Everything) -> None:
    assert isinstance(small, Everything)
    assert type(small).__name__ == "Everything"
    assert type(small) is not Everything
    assert set(dict(small.named_modules())) == set(dict(original.named_modules()))
    assert isinstance(small.conv, Padded)


def test_every_weight_is_on_a_grid(original: Everything, small: Everything) -> None:
    lines = {line.name: line for line in small.plan}
    for name, tensor in original.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() >= 2 and name != "head.weight":  # tied: under its first name
            assert lines[name].format == "grid int8", name
    assert lines["positions"].format == "int64"
    assert lines["norm.weight"].format == "float16"


def test_state_dict_gives_codes_and_steps(original: Everything, small: Everything) -> None:
    state = small.state_dict()
    for name, tensor in original.state_dict().items():
        assert name in state
        if tensor.dim() >= 2:
            assert state[name].dtype == torch.int8
            assert state[name].shape == tensor.shape
            assert state[f"{name}_step"].dtype == torch.float32
    assert set(state) - set(original.state_dict()) == {k for k in state if k.endswith("_step")}


@pytest.fixture(scope="module")
def stranger() -> Everything:
    """Other weights, quantized."""
    torch.manual_seed(9)
    return pared.fit(Everything(), PostTrainingQuantConfig(approach="weight_only"), [ids()])


def test_state_dict_comes_back(small: Everything, stranger: Everything) -> None:
    other = copy.deepcopy(stranger)
    other.load_state_dict(small.state_dict())
    state, again = small.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(other.mix, small.mix)
    assert torch.equal(other.table.weight, small.table.weight)


def test_a_state_dict_that_does_not_fit_is_refused(small: Everything) -> None:
    state = small.state_dict()
    del state["mix"]
    with pytest.raises(RuntimeError, match="mix"):
        copy.deepcopy(small).load_state_dict(state)
    state = small.state_dict()
    state["conv.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"conv\.weight"):
        copy.deepcopy(small).load_state_dict(state)


def test_weights_read_as_floats(original: Everything, small: Everything) -> None:
    for name in ("table", "head", "conv", "up"):
        weight = getattr(small, name).weight
        exact = getattr(original, name).weight
        assert weight.dtype == torch.float32
        assert snr(exact.detach(), weight.detach()) > 35
    assert torch.equal(small.table.weight, small.head.weight)


def saved_bytes(thing: object) -> int:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getbuffer().nbytes


def test_however_it_is_saved_it_is_small(original: Everything, small: Everything, tmp_path: Path) -> None:
    plain = saved_bytes(original.state_dict())
    assert saved_bytes(small.state_dict()) < 0.34 * plain  # torch spends about 300 bytes on each of 56 tensors
    assert saved_bytes(small) < 0.34 * plain
    assert pared.save(small, tmp_path).stat().st_size < 0.3 * plain


@pytest.mark.parametrize("way", copies())
def test_a_copy_gives_the_same_outputs(small: Everything, way: str) -> None:
    with torch.no_grad():
        small(ids())  # packs weights, which cannot be copied
        clone = copies()[way](small)
        assert isinstance(clone, Everything)
        assert torch.equal(clone(ids()), small(ids()))
        assert clone.plan == small.plan
        assert clone.state_dict().keys() == small.state_dict().keys()


def test_a_deep_copy_is_independent(small: Everything) -> None:
    clone = copy.deepcopy(small)
    with torch.no_grad():
        clone.norm.bias.add_(1.0)
    assert not torch.equal(clone.norm.bias, small.norm.bias)


def test_a_part_can_be_copied_and_saved_by_itself(small: Everything) -> None:
    part = copy.deepcopy(small.conv)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(part(x), small.conv(x))
        again = pickle.loads(pickle.dumps(part)) if isinstance(part, Counterpart) else part
        assert torch.equal(again(x), small.conv(x))
    assert small.lstm.state_dict()["weight_ih_l0"].dtype == torch.int8


def test_threads_agree(small: Everything) -> None:
    fresh = copy.deepcopy(small)  # nothing packed yet: all threads meet at the first use
    with torch.no_grad():
        expected = small(ids())
    results: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            results.append(fresh(ids()))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


def test_share_memory_works(small: Everything) -> None:
    clone = copy.deepcopy(small).share_memory()
    assert all(tensor.is_shared() for tensor in (*clone.parameters(), *clone.buffers()))
    with torch.no_grad():
        assert torch.equal(clone(ids()), small(ids()))


def test_compile_gives_close_outputs(small: Everything) -> None:
    compiled = torch.compile(copy.deepcopy(small), backend="eager")
    with torch.no_grad():
        assert snr(small(ids()), compiled(ids())) > 25


def test_export_goes_through_decoded_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    q = pared.fit(model, PostTrainingQuantConfig(approach="static"), [x])
    exported = torch.export.export(q, (x,)).module()
    with torch.no_grad():
        assert snr(model(x), exported(x)) > 30


def test_gradients_reach_the_input(small: Everything) -> None:
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    small.conv(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_type_leaves_codes_and_steps(small: Everything, dtype: torch.dtype) -> None:
    before = small.state_dict()
    cast = copy.deepcopy(small).to(dtype)
    assert cast.mix.dtype == cast.conv.weight.dtype == cast.table.weight.dtype == dtype
    after = cast.state_dict()
    for name, tensor in before.items():
        if name.endswith("_step") or tensor.dtype == torch.int8:
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("approach", ["weight_only", "dynamic", "static"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_root_that_is_a_linear(approach: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 48, bias=bias)
    x = torch.randn(32, 96)
    conf = PostTrainingQuantConfig(approach=approach)
    q = pared.fit(layer, conf, [x])
    assert isinstance(q, nn.Linear)
    assert next(q.parameters()).is_floating_point()
    assert q.weight.shape == (48, 96)
    pared.save(q, tmp_path)
    loaded = pared.load(tmp_path, model=nn.Linear(96, 48, bias=bias, device="meta"))
    with torch.no_grad():
        assert snr(layer(x), q(x)) > 30
        assert torch.equal(loaded(x), q(x))
        assert torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))


def test_a_changed_weight_is_noticed_and_not_lost(original: Everything, tmp_path: Path) -> None:
    q = pared.fit(original, PostTrainingQuantConfig(approach="weight_only"))
    with torch.no_grad():
        q.mix.add_(0.0123)
    with pytest.raises(ModelError, match="mix: was changed after it was compressed"):
        pared.save(q, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="mix: was changed after it was compressed"):
        q.state_dict()


def test_a_buffer_may_become_nan() -> None:
    model = nn.Module()
    model.register_buffer("state", torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    q = pared.fit(model)
    assert q.state_dict()["state"].dtype == torch.int8
    q.state[0, 0] = math.nan
    stored = q.state_dict()["state"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored.nan_to_num(7.0), q.state.nan_to_num(7.0))


def test_only_quantized_models_have_a_record() -> None:
    with pytest.raises(ModelError, match="Linear is not a quantized model"):
        record_of(nn.Linear(1, 1))


def test_the_kept_are_exact(original: Everything) -> None:
    rules = [
        Rule("lstm", keep=True, because="streaming state"),
        Rule(nn.GRU, bits=16),
        Rule("head.weight", bits=3),
    ]
    q = pared.fit(original, PostTrainingQuantConfig(rules=rules))
    assert torch.equal(q.lstm.weight_ih_l0, original.lstm.weight_ih_l0)
    lines = {line.name: line for line in q.plan}
    assert lines["lstm.weight_hh_l0"].because == "streaming state"
    assert lines["gru.weight_hh_l0"].format == "float16"
    assert lines["table.weight"].bits == 3  # a rule on one name of a tied tensor holds for the tensor


def test_stored_forms_give_tied_names_the_same_codes() -> None:
    q = pared.fit(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}))
    state = q.state_dict()
    assert state["a.weight"].data_ptr() != state["b.weight"].data_ptr()
    tied = pared.fit(Everything(), PostTrainingQuantConfig(approach="weight_only")).state_dict()
    assert tied["table.weight"].data_ptr() == tied["head.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("approach", ["static", "dynamic", "weight_only"])
def test_models_of_other_types_keep_theirs(dtype: torch.dtype, approach: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)).to(dtype)
    x = torch.randn(64, 32).to(dtype)
    q = pared.fit(model, PostTrainingQuantConfig(approach=approach), [x])
    pared.save(q, tmp_path)
    loaded = pared.load(tmp_path, model=copy.deepcopy(model))
    with torch.no_grad():
        assert q(x).dtype == dtype
        assert snr(model(x).double(), q(x).double()) > 28
        assert torch.equal(loaded(x), q(x))
    if dtype == torch.float64:
        assert {line.treatment for line in q.plan} == {"grid", "float16"}
        assert {line.kernel for line in q.plan} == {"float"}


def test_a_table_that_edits_itself_is_kept() -> None:
    table = nn.Embedding(64, 8, max_norm=1.0)
    q = pared.fit(nn.Sequential(table), PostTrainingQuantConfig(approach="dynamic"), [torch.arange(64)])
    q(torch.arange(64))
    assert q.state_dict()["0.weight"].dtype == torch.float32


def test_a_module_is_in_codes_with_all_of_its_weights_or_with_none() -> None:
    class Borrows(nn.Module):
        """Holds one weight of each of its layers a second time, where nobody looks for it."""

        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(16, 16), nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2)
            self.own = [self.lstm.weight_ih_l0, self.linear.weight, self.attention.out_proj.weight]

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(self.lstm(x)[0])
            out: Tensor = self.attention(x, x, x)[0]
            return out

    model = Borrows().eval()
    q = pared.fit(model, PostTrainingQuantConfig(approach="dynamic", quant_level=0))
    assert not any(isinstance(module, Counterpart) for module in q.modules())
    assert {line.kernel for line in q.plan} == {"float"}
    assert any("one of its weights is also used elsewhere, as floats" in line.because for line in q.plan)
    x = torch.randn(5, 2, 16)
    with torch.no_grad():
        assert torch.allclose(q(x), model(x), atol=0.05)


def test_the_report_keeps_the_other_names_of_a_tied_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.weight = self.a.weight

    q = pared.fit(Tied(), PostTrainingQuantConfig(rules=[Rule("a.weight", bits=6, because="wished")]))
    assert "wished; also b.weight" in q.report()
