"""Models run on what was compressed, and on what was expanded: tied ones, those of `fit`, folders of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import pared
from pared.checkpoints import compress, expand
from pared.errors import MismatchError
from pared.model import storage
from tests.checkpoints.states import State, saved, there_and_back
from tests.ratios import snr


class Tied(nn.Module):
    """Two names for one weight, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.embedding(x))) * self.scale
        return y


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 1},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
)
def test_a_model_runs_on_what_was_compressed(wrap: Callable[[State], object], tmp_path: Path) -> None:
    model = Tied().eval()
    path = pared.compress(saved(wrap(model.state_dict()), tmp_path / "m.pt"), tmp_path / "out")
    small = pared.load(path.parent, model=Tied())
    x = torch.arange(60)
    assert snr(model(x), small(x)) > 35
    assert small.head.weight is small.embedding.weight
    assert pared.inspect(tmp_path / "out").original_nbytes == sum(t.nbytes for t in Tied().parameters()) + 2 * 64 + 8
    again = pared.load(pared.save(small, tmp_path / "again"), model=Tied())
    assert torch.equal(again(x), small(x))


def test_a_checkpoint_without_the_second_name_fits_a_tied_model(tmp_path: Path) -> None:
    model = Tied().eval()
    state = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    small = pared.load(pared.compress(saved(state, tmp_path / "m.pt"), tmp_path / "out"), model=Tied())
    assert snr(model(torch.arange(60)), small(torch.arange(60))) > 35
    missing = {name: value for name, value in state.items() if name != "norm.weight"}
    path = pared.compress(saved(missing, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(MismatchError, match="the artifact lacks norm.weight"):
        pared.load(path, model=Tied())


def test_tied_weights_expand_under_both_names(tmp_path: Path) -> None:
    model = Tied()
    found = there_and_back(model.state_dict(), tmp_path)
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    model.load_state_dict(found)
    done = expand.run(tmp_path / "small", tmp_path / "again.safetensors", quiet=True)
    assert done.tied == ("head.weight",)
    assert "tied: head.weight stored again, 3,840 bytes" in str(done)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_what_fit_made_expands_to_the_weights_that_it_runs_on(kind: str, tmp_path: Path) -> None:
    conf = pared.PostTrainingQuantConfig(rules=[pared.Rule("1", bits=4), pared.Rule("2", keep=True)])
    fitted = pared.fit(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60), nn.Conv1d(60, 3, 2)), conf, quiet=True)
    path = pared.save(fitted, tmp_path / "fitted", container=kind)
    found = safetensors.torch.load_file(pared.expand(path, tmp_path / "out"))
    contents = storage.read(path)
    assert set(found) == {name for stored in contents.tensors for name in stored.names}
    assert all(torch.equal(found[stored.name], stored.coded.decode()) for stored in contents.tensors)


def frozen(model: Any) -> Any:
    """A model of transformers, whose methods have no types, ready to be called."""
    return model.requires_grad_(False).eval()


def bert() -> Any:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=500)
    )
    return frozen(model)


@pytest.mark.slow
def test_a_sharded_folder_there_and_back(tmp_path: Path) -> None:
    model, x = bert(), torch.arange(20)[None]
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "1_Pooling").mkdir()
    (tmp_path / "hf" / "1_Pooling" / "config.json").write_text("{}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    done = compress.run(tmp_path / "hf", tmp_path / "small", quiet=True)
    assert done.copied == ("config.json", "tokenizer.json", "1_Pooling/config.json")
    files = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert files == ["1_Pooling", "best_model.pt", "config.json", "tokenizer.json"]
    empty: Any = AutoModel.from_config(BertConfig.from_pretrained(tmp_path / "small"))  # type: ignore[no-untyped-call]  # theirs
    small = pared.load(tmp_path / "small", model=empty)
    with torch.no_grad():
        expected, found = model(x).last_hidden_state, small(x).last_hidden_state
    assert snr(expected, found) > 30
    pared.expand(tmp_path / "small", tmp_path / "big")
    again = frozen(AutoModel.from_pretrained(tmp_path / "big"))
    with torch.no_grad():
        assert torch.allclose(again(x).last_hidden_state, found, atol=1e-5)


def test_a_tied_language_model_of_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=16)
    model, x = frozen(GPT2LMHeadModel(config)), torch.arange(10)[None]
    model.save_pretrained(tmp_path / "hf")
    pared.compress(tmp_path / "hf", tmp_path / "small")
    small = pared.load(tmp_path / "small", model=GPT2LMHeadModel(config))
    pared.expand(tmp_path / "small", tmp_path / "big")
    again = frozen(GPT2LMHeadModel.from_pretrained(tmp_path / "big"))
    with torch.no_grad():
        assert snr(model(x).logits, small(x).logits) > 30
        assert torch.allclose(again(x).logits, small(x).logits, atol=1e-5)


def test_the_output_may_be_within_the_source(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "hf")
    pared.compress(tmp_path / "hf", tmp_path / "hf" / "small")
    first = (tmp_path / "hf" / "small" / "best_model.pt").read_bytes()
    pared.compress(tmp_path / "hf", tmp_path / "hf" / "small")
    assert (tmp_path / "hf" / "small" / "best_model.pt").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "hf" / "small").iterdir()) == ["best_model.pt", "config.json"]
