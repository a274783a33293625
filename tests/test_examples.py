"""The real models and data that everything else is judged by: they are what we say they are."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from examples import demo, dual_path, g2p, minilm, mnist, package_folder
from rich.console import Console
from torch import nn

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return minilm.load()


@pytest.fixture(scope="module")
def speller() -> nn.Module:
    return g2p.load()


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return mnist.load()


@pytest.fixture(scope="module")
def recurrent() -> nn.Module:
    return dual_path.load()


@pytest.mark.parametrize(
    ("model", "skeleton"),
    [
        ("bert", minilm.skeleton),
        ("speller", g2p.skeleton),
        ("digits", mnist.skeleton),
        ("recurrent", dual_path.skeleton),
    ],
)
def test_a_skeleton_has_the_shapes_and_no_data(
    model: str, skeleton: Callable[[], nn.Module], request: pytest.FixtureRequest
) -> None:
    loaded: nn.Module = request.getfixturevalue(model)
    bare = skeleton()
    state = bare.state_dict()
    assert type(bare) is type(loaded)
    assert all(tensor.is_meta for tensor in [*bare.parameters(), *bare.buffers()])
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in loaded.state_dict().items()
    }
    assert not bare.training
    assert not loaded.training


def test_minilm_agrees_with_people_as_published(bert: nn.Module) -> None:
    assert minilm.score(bert) == pytest.approx(0.5085, abs=0.001)


def test_minilm_calibrates_on_a_hundred_documents_that_do_not_score(bert: nn.Module) -> None:
    batches = minilm.calibration()
    assert sum(len(batch["input_ids"]) for batch in batches) == 100
    assert max(batch["input_ids"].shape[1] for batch in batches) == 128
    assert len(minilm.documents()) == 50
    scored = {tuple(row) for row in minilm.tokenize(minilm.documents(), 128)["input_ids"].tolist()}
    assert not scored & {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}
    with torch.no_grad():
        assert bert(**minilm.calibration(2)[0]).last_hidden_state.shape == (2, 128, 384)


def test_distance_is_one_minus_the_mean_cosine() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert minilm.distance(x, x) == 0
    assert minilm.distance(x, y) == 0.5


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert minilm._ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_g2p_spells_as_published(speller: nn.Module) -> None:
    scores = g2p.scores(speller)
    assert scores.shape == (1000,)
    assert scores.mean() == pytest.approx(0.8978, abs=0.0005)


def test_g2p_calibrates_on_words_that_do_not_score() -> None:
    batches = g2p.calibration()
    assert [letters.shape[0] for letters, _ in batches] == [25, 25, 25, 25]
    words = list(g2p.dictionary())
    assert not set(words[:2000]) & set(words[-100:])


@pytest.mark.parametrize(
    ("said", "known", "edits"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
    ],
)
def test_edits_are_levenshteins(said: str, known: str, edits: int) -> None:
    assert g2p._edits(list(said), list(known)) == edits


def test_mnist_tells_held_back_digits(digits: nn.Module) -> None:
    assert mnist.scores(digits).shape == (1000,)
    assert mnist.score(digits) >= 0.93
    assert {type(layer) for layer in digits.children()} >= {
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.GroupNorm,
        nn.Linear,
    }
    assert all(parameter.grad is None for parameter in digits.parameters())
    assert [batch.shape for batch in mnist.calibration()] == [(25, 1, 28, 28)] * 4


def test_the_dual_path_model_is_as_large_as_the_one_that_doubled(recurrent: nn.Module) -> None:
    assert sum(t.nbytes for t in recurrent.state_dict().values()) == pytest.approx(131.47e6, rel=0.01)
    assert {type(layer) for layer in recurrent.modules()} >= {
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.Linear,
        nn.LSTM,
    }


def test_the_dual_path_model_always_has_the_same_weights(recurrent: nn.Module) -> None:
    before = torch.random.get_rng_state()
    again = dual_path.load()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), recurrent.parameters(), strict=True))


def test_the_dual_path_model_keeps_shapes_and_cannot_be_traced(recurrent: nn.Module) -> None:
    spectrum = dual_path.calibration()[0]
    with torch.no_grad():
        assert recurrent(spectrum).shape == spectrum.shape == (1, 2, 40, 64)
    with pytest.raises(TypeError, match="not 'Proxy'"):
        torch.fx.symbolic_trace(recurrent)


def test_snr_is_infinite_for_no_difference_and_20_db_for_a_tenth(
    recurrent: nn.Module,
) -> None:
    class Louder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            louder: torch.Tensor = 1.1 * recurrent(x)
            return louder

    assert dual_path.snr(recurrent, recurrent) == float("inf")
    assert dual_path.snr(Louder(), recurrent) == pytest.approx(20, abs=1e-4)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"^The package 'no_such_data' is not installed: run `make setup`\.$"):
        package_folder("no_such_data")


def test_the_demo_prints_a_table_that_fits_eighty_columns() -> None:
    rows = [
        demo.Row("FP32", 90_000_000, 0.0, 0.5085, [1380.0, 10.0]),
        demo.Row("pared", 18_000_000, 0.00091, 0.509, [345.0, 5.0]),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(demo.table(rows))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().replace("│", " ").splitlines()]
    assert ["FP32", "90.00", "1.000", "0", "0.5085", "1380.0", "(1.00x)", "10.0", "(1.00x)"] in lines
    assert ["pared", "18.00", "0.200", "0.00091", "0.5090", "345.0", "(0.25x)", "5.0", "(0.50x)"] in lines
