"""The damage of a result is measured on calibration calls; where it is far beyond the prediction, it is repaired."""

import copy
import gc
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig, Rule
from pared.artifact.outcome import Damage
from pared.fitting.calibration.observe import collect
from pared.fitting.measured.repair import FACTOR, TOLERABLE, Corrections, Refiner
from pared.fitting.measured.yardstick import Yardstick
from pared.fitting.search.free import on_grids
from pared.fitting.search.free.on_grids import FreeTensor, rounded
from pared.formats.coded import Coded

pytestmark = pytest.mark.slow


def measured(model: nn.Module, q: nn.Module, batches: list[Tensor]) -> float:
    lost = total = 0.0
    with torch.no_grad():
        for x in batches:
            y = model(x)
            lost += float((q(x) - y).square().sum())
            total += float(y.square().sum())
    return lost / total


def batches(columns: int = 32, n: int = 3) -> list[Tensor]:
    return [torch.randn(64, columns, generator=torch.Generator().manual_seed(i)) for i in range(n)]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant_level": 0},
        {"max_size": 4500},
        *({"approach": approach} for approach in ("static", "dynamic", "weight_only")),
    ],
)
def test_every_result_is_measured(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    q: Any = pared.fit(model, PostTrainingQuantConfig(**options), batches(), quiet=True)
    found = q.pared.damage
    assert found.measured == pytest.approx(measured(model, q, batches()[:1]), rel=0.02)
    assert 0 < found.predicted < 10 * found.measured
    assert found.calls == 1, "its 64 samples are enough"
    assert [name for name, _ in found.outputs] == ["output"]
    line = f"damage: predicted {found.predicted:.2g}, measured {found.measured:.2g} on 1 call"
    assert line in q.report().splitlines()
    again: Any = copy.deepcopy(q)
    assert again.pared.damage == found


def test_a_searched_result_is_measured_without_further_evaluations() -> None:
    torch.manual_seed(0)
    model, asked = Net().eval(), []

    def score(candidate: nn.Module) -> float:
        asked.append(candidate)
        return 1 - measured(model, candidate, batches())

    q: Any = pared.fit(model, None, batches(), score, quiet=True)
    assert len(asked) == 1 + len(q.pared.trials)
    assert q.pared.damage.measured == pytest.approx(1 - q.pared.score, rel=0.2)


def test_what_is_measured_before_a_search_is_not_rounded_again_for_its_first_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[str, int]] = []

    def noted(free: FreeTensor, option: int) -> Coded:
        made.append((free.model_tensor.name, option))
        return rounded(free, option)

    monkeypatch.setattr(on_grids, "rounded", noted)
    torch.manual_seed(0)
    pared.fit(Net().eval(), PostTrainingQuantConfig(max_trials=1), batches(), lambda candidate: 1.0, quiet=True)
    assert len(made) == len(set(made)) > 0


@pytest.mark.parametrize("nbytes", range(4400, 4464, 9))
def test_the_outcome_of_a_model_that_nobody_scored_fits_into_the_room_left_for_it(nbytes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = pared.fit(Net().eval(), PostTrainingQuantConfig(max_size=nbytes, approach="weight_only"), batches(), quiet=True)
    assert nbytes - 192 < pared.save(q, tmp_path).stat().st_size <= nbytes


class Together:
    """In place of a yardstick: all tensors at once do four times the predicted damage, and fewer do as predicted."""

    def with_weights(self, values: dict[str, Tensor]) -> float:
        return 0.04 if len(values) == 4 else 0.0025 * len(values)


def test_tensors_that_only_together_do_too_much_count_as_much_more_as_they_did() -> None:
    nothing: Any = None
    yardstick: Any = Together()
    coded: Any = SimpleNamespace(decode=lambda: torch.zeros(1))
    weights: Any = [(SimpleNamespace(name=name, coded=coded), 0.0025) for name in "abcd"]
    found = Refiner(nothing, nothing, nothing, yardstick)._refined(weights, Corrections())
    assert found is not None
    assert found.factors == pytest.approx(dict.fromkeys("abcd", 4.0))


def test_without_calibration_data_nothing_is_measured_and_that_is_said() -> None:
    q: Any = pared.fit(Net().eval(), quiet=True)
    assert q.pared.damage == Damage(notes=("no damage was measured: there are no calibration data",))
    assert "no damage was measured" in q.report()


class Normed(nn.Module):
    """Divides a weight by its norm in its own forward: of zeros that is not a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.main, self.branch, self.scale = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32)), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return y + self.scale * x @ (self.branch / self.branch.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("scored", [False, True])
def test_what_is_not_finite_is_repaired(scored: bool) -> None:
    torch.manual_seed(0)
    model = Normed(1e-3).eval()

    def score(candidate: nn.Module) -> float:
        found = measured(model, candidate, batches())
        return 1 - found if math.isfinite(found) else 0.0

    q: Any = pared.fit(model, None, batches(), score if scored else None, quiet=True)
    assert measured(model, q, batches()) < (2e-2 if scored else 2e-3)
    assert any("branch" in note and "more finely" in note for note in q.pared.damage.notes)
    assert "stored more finely" in q.report()


class Refusing(Normed):
    """Checks its weights in its own forward: of zeros there is an error in place of an output."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((self.branch.norm(dim=1) == 0).any()):
            raise ValueError("a direction has no length\nwhich is told at length")
        return super().forward(x)


def test_what_lets_a_call_fail_is_repaired() -> None:
    torch.manual_seed(0)
    model = Refusing(1e-3).eval()
    q: Any = pared.fit(model, None, batches(), quiet=True)
    assert measured(model, q, batches()) < 2e-3
    assert any("branch" in note and "more finely" in note for note in q.pared.damage.notes)


def test_a_result_whose_calls_fail_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    rules = [Rule("branch", bits=0.1)]
    with caplog.at_level(logging.WARNING, "pared"):
        q: Any = pared.fit(Refusing(1e-3).eval(), PostTrainingQuantConfig(rules=rules), batches(), quiet=True)
    assert [record.message for record in caplog.records if "a recorded call fails in the result" in record.message]
    assert q.pared.damage.measured == math.inf
    assert q.report().count("a recorded call fails in the result: ValueError: a direction has no length") == 1
    assert "told at length" not in q.report()


def test_weights_with_which_a_call_fails_lose_everything() -> None:
    model = Refusing(1e-3).eval()
    yardstick = Yardstick(model, collect(model, batches(), 100), 0)
    assert yardstick.with_weights({"branch": torch.zeros(32, 32)}) == math.inf
    assert yardstick.with_weights({"branch": model.branch.detach()}) == 0.0, "they are put back"


def test_a_search_keeps_no_copies_of_the_float_model(tmp_path: Path) -> None:
    class Counted(Net):
        pass

    alive: list[int] = []

    def score(candidate: nn.Module) -> float:
        gc.collect()
        alive.append(sum(type(one) is Counted for one in gc.get_objects()))
        return 1.0

    torch.manual_seed(0)
    pared.fit(Counted().eval(), PostTrainingQuantConfig(max_trials=2), batches(), score, quiet=True)
    assert alive == [2, 1, 1], "of the float model one is scored; then there is only the user's"


class Codebook(nn.Module):
    """What stands before an argmin has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.book, self.decoder = nn.Linear(32, 16), nn.Embedding(64, 16), nn.Linear(16, 32)
        self.skip = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.encoder(x)
        code = torch.cdist(z, self.book.weight).argmin(1)
        y: Tensor = self.decoder(self.book(code)) + self.skip(x)
        return y


class Chosen(nn.Module):
    """Chooses one of two layers by a third, which no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.other = nn.Linear(32, 1), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.gate(x) > 0, self.one(x), self.other(x))


@pytest.mark.parametrize("kind", [Codebook, Chosen])
def test_what_no_gradient_reaches_is_measured(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    q: Any = pared.fit(model, None, batches(), quiet=True)
    assert measured(model, q, batches()) < FACTOR * TOLERABLE


def test_what_a_rule_breaks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Normed(1e-3).eval()
    with caplog.at_level(logging.WARNING, "pared"):
        q: Any = pared.fit(model, PostTrainingQuantConfig(rules=[Rule("branch", bits=0.1)]), batches(), quiet=True)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "not finite on the calibration data" in caplog.text
    assert q.pared.damage.measured == math.inf
    assert "an output of the result is not finite" in q.report()


class Spoken(nn.Module):
    """The number of its frames depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.frames = nn.Linear(32, 1), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        frames = int(1e5 * self.length(x).abs().sum())
        return {"waveform": self.frames(x).reshape(1, -1)[:, :1].expand(1, frames), "frames": self.frames(x)}


def test_outputs_of_another_length_are_named_and_the_others_are_compared() -> None:
    torch.manual_seed(0)
    model = Spoken().eval()
    q: Any = pared.fit(model, PostTrainingQuantConfig(quant_level=0), batches(n=1), quiet=True)
    found = q.pared.damage
    assert [name for name, _ in found.outputs] == ["frames"]
    assert found.measured < 2e-3
    assert found.notes[0].startswith("waveform cannot be compared: the shape (1, ")


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": torch.randn_like,
    "NumPy": lambda y: torch.from_numpy(np.random.standard_normal(y.shape)).to(y.dtype),
    "Python": lambda y: y * random.random(),
}


@pytest.mark.parametrize("noise", NOISES)
def test_models_that_draw_random_numbers_draw_the_same_ones(noise: str) -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]  # as torch has it
            return y + NOISES[noise](y)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    q: Any = pared.fit(Noisy().eval(), PostTrainingQuantConfig(quant_level=0), batches(), quiet=True)
    assert q.pared.damage.measured < 1e-3
    assert state.shape == torch.get_rng_state().shape
