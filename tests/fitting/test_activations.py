"""Which layers run in int8: where it is accurate enough, and only where it was measured to be faster."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import CalibrationError, PostTrainingQuantConfig
from pared.fitting.calibration.gathering.noise import LEVELS
from pared.fitting.calibration.observe import InputStats, collect
from pared.fitting.calibration.sensitivity import InputNoise
from pared.fitting.rounding.encoding import encode
from pared.fitting.rounding.plan import make_plan
from pared.fitting.search import activations
from pared.fitting.timing import layers as timed_layers
from pared.fitting.timing.layers import measure
from pared.model.contents import Stored
from pared.model.tensors import find_tensors
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import Timing


class Blocks(nn.Module):
    """Layers whose inputs are tame, wild in one row, and wild in every row; the wild numbers meet weights of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.tame = nn.Linear(64, 64)
        self.rows = nn.Linear(64, 64)
        self.wild = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)
        with torch.no_grad():
            self.rows.weight[:, 0] = 0
            self.wild.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        one, every = x.clone(), x.clone()
        one[0, 0] = 1e5
        every[:, 0] = 1e5
        out: Tensor = self.tame(x) + self.rows(one) + self.wild(every)
        return out


X = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))


def force(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Let every measurement come out the same way."""
    times = [1.0 if name == kernel else 2.0 for name in ("float32", "bfloat16", "int8")]
    monkeypatch.setattr(timed_layers, "measure", lambda forms, shape, dtype, call: Timing(shape, *times))


def kernels(model: nn.Module) -> dict[str, str]:
    return {line.name: line.kernel for line in model.plan}


EIGHT = PostTrainingQuantConfig(quant_level=0)


def test_inputs_whose_rounding_costs_too_much_stay_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "int8")
    torch.manual_seed(0)
    found = kernels(pared.fit(Blocks(), EIGHT, [X]))
    assert found["tame.weight"] in ("int8 static", "int8 dynamic")
    assert found["rows.weight"] != "int8 static"  # one row's grid is coarse, not that of all
    assert found["wild.weight"] == "float"  # every row's grid is too coarse for what counts
    assert found["unused.weight"] == "float"


def test_the_cheapest_inputs_are_rounded_first_until_the_budget_is_spent() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    stored = stored_of(model)
    inputs = collect(model, [torch.randn(4, 8)], 9).inputs
    found = activations.find_candidates(model, stored, inputs)
    costs = {"0": (1.0, 5.0), "1": (9.0, 2.0), "2": (4.0, 8.0), "3": (99.0, 99.0)}  # of static and of dynamic
    units = {name: ((inputs[name].high - inputs[name].low) / LEVELS) ** 2 / 12 for name in costs}
    noise = {f"{name}.weight": InputNoise(static / units[name], dynamic) for name, (static, dynamic) in costs.items()}
    chosen = activations.choose_activations(found, "auto", noise, 7.5)
    assert {name: a.mode for name, a in chosen.items()} == {"0": "static", "1": "dynamic", "2": "static"}
    assert set(activations.choose_activations(found, "auto", noise, 2.5)) == {"0"}
    dynamic = activations.choose_activations(found, "dynamic", noise, 8)
    assert {name: a.mode for name, a in dynamic.items()} == {"0": "dynamic", "1": "dynamic"}
    assert set(activations.choose_activations(found, "static", noise, float("inf"))) == {"0", "1", "2", "3"}
    assert activations.choose_activations(found, "weight_only", noise, float("inf")) == {}
    assert activations.choose_activations(found, "auto", {}, 1.0) == {}, "nothing is known of their inputs"


@pytest.mark.slow
def test_sums_of_products_stay_within_32_bits() -> None:
    wide = 2**31 // (255 * 127)
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"most": nn.Linear(wide, 1), "more": nn.Linear(wide + 1, 1), "filter": nn.Conv1d(1024, 1, 64)}
    )
    stored = stored_of(model)
    rows = {"most": wide, "more": wide + 1}
    inputs = {name: InputStats(-1.0, 9.0, (1, n), None, -torch.ones(n), torch.ones(n)) for name, n in rows.items()}
    for one in inputs.values():
        assert one.highs is not None
        one.highs[3] = 9.0
    inputs["filter"] = InputStats(-1.0, 1.0, (1, 1024, 64))
    found = {one.name: one for one in activations.find_candidates(model, stored, inputs)}
    assert set(found) == {"most", "filter"}
    assert [one.outliers for one in found["most"].options("static")] == [()], "there is no room for an extra column"


def test_a_layer_that_is_not_faster_stays_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "float32")
    q = pared.fit(Blocks(), PostTrainingQuantConfig(approach="static", quant_level=0), [X])
    assert set(kernels(q).values()) == {"float"}
    line = next(line for line in q.plan if line.name == "tame.weight")
    assert line.because == "int8 is not the fastest on this machine"
    assert q.state_dict()["tame.weight"].dtype == torch.int8


def test_bfloat16_runs_where_it_is_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    force(monkeypatch, "bfloat16")
    model = Blocks()
    q = pared.fit(model, PostTrainingQuantConfig(approach="static", quant_level=0), [X])
    assert kernels(q)["tame.weight"] == "bfloat16"
    loaded = pared.load(pared.save(q, tmp_path), model=Blocks())
    with torch.no_grad():
        exact, out = model.tame(X), q.tame(X)
        assert out.dtype == torch.float32
        assert 10 * torch.log10(exact.square().sum() / (exact - out).square().sum()) > 35
        assert torch.equal(loaded.tame(X), out)
    assert q.state_dict()["tame.weight"].dtype == torch.int8


def test_the_choice_is_kept_beside_the_artifact_not_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conf = PostTrainingQuantConfig(approach="static", quant_level=0)
    force(monkeypatch, "int8")
    fast = pared.fit(Blocks(), conf, [X])
    path = pared.save(fast, tmp_path)
    assert kernels(pared.load(path, model=Blocks())) == kernels(fast)
    force(monkeypatch, "float32")
    slow = pared.load(path, model=Blocks())
    assert kernels(slow)["tame.weight"] == "int8 static", "engine.json says so, whatever a new measurement would"
    (path.parent / "engine.json").unlink()
    assert kernels(pared.load(path, model=Blocks()))["tame.weight"] == "int8 static"


def test_a_profile_survives_json() -> None:
    profile = Profile(this_machine(), {"a": Timing((1, 2), 1.0, 2.0, 3.0)})
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert again.running("a").kernel == "float32"


def test_a_real_measurement_reports_three_times() -> None:
    timing = measure({"float32": nn.Linear(8, 8), "bfloat16": nn.Linear(8, 8), "int8": nn.Linear(8, 8)}, (4, 8))
    assert min(timing.float32_ms, timing.bfloat16_ms, timing.int8_ms) > 0
    assert timing.shape == (4, 8)


def test_a_table_that_is_multiplied_with_is_decoded_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Embedding(2000, 64), nn.Embedding(2000, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.table(ids) + self.other(ids), self.table.weight)

    found = kernels(pared.fit(Tied(), PostTrainingQuantConfig(quant_level=0), [torch.arange(50)[None]]))
    assert found == {"table.weight": "float", "other.weight": "int8 gather"}


def test_without_calibration_nothing_is_quantized_but_the_weights() -> None:
    assert set(kernels(pared.fit(Blocks())).values()) == {"float"}
    dynamic = pared.fit(Blocks(), PostTrainingQuantConfig(approach="dynamic"))
    assert kernels(dynamic)["tame.weight"] == "int8 dynamic"  # asked for by name


def test_static_without_calibration_is_refused() -> None:
    with pytest.raises(CalibrationError) as error:
        pared.fit(Blocks(), PostTrainingQuantConfig(approach="static"))
    assert str(error.value) == (
        'pared.fit: approach="static" needs calibration data, and there are none\n'
        '  Pass calib_dataloader, or choose approach="dynamic" or "weight_only".'
    )


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_bad_activations_name_the_layer(value: float, word: str) -> None:
    x = X.clone()
    x[3, 4] = value
    with pytest.raises(CalibrationError) as error:
        pared.fit(Blocks(), None, [x])
    assert str(error.value).splitlines()[0] == f"tame: its input holds {word} during calibration"


def test_some_calls_are_spaced_evenly_and_keep_their_energies() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    seen = collect(model, [torch.randn(4, 8) for _ in range(10)], 10**9)
    assert len(seen.energies) == 1
    key = ("output", False, "")
    assert seen.energies[key] == pytest.approx(sum(energies[key] for energies in seen.energies_of_calls))
    some = seen.some(10)
    assert [id(call) for call in some.calls] == [id(seen.calls[i]) for i in (0, 3, 6)]
    assert some.energies_of_calls == tuple(seen.energies_of_calls[i] for i in (0, 3, 6))
    assert seen.some(10**6).calls == seen.calls
    assert len(seen.some(1).calls) == 1
    assert seen.some(10).samples == 12


def test_some_calls_are_counted_by_their_own_samples() -> None:
    def endless(model: nn.Module) -> None:
        for _ in range(100):
            model(torch.randn(4, 8))

    seen = collect(nn.Sequential(nn.Linear(8, 8)), endless, 40)
    assert (len(seen.calls), len(seen.some(10).calls)) == (10, 3)


def test_outliers_have_to_be_worth_their_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    for reach, ways in ((1.0, 1), (9.0, 2)):
        x = torch.rand(32, 64)
        x[3, 7] = reach
        (found,) = activations.find_candidates(model, stored_of(model), collect(model, [x], 99).inputs)
        assert len(found.options("static")) == ways


def stored_of(model: nn.Module) -> list[Stored]:
    model_tensors = find_tensors(model)
    plan = make_plan(model_tensors, ())
    return [Stored(s.names, s.kind, encode(s, d), d) for s, d in zip(model_tensors, plan, strict=True)]


def test_statistics_are_bounded_and_right() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    batches = [torch.randn(4096, 64) for _ in range(6)]
    seen = collect(model, batches, 10**9)
    assert seen.samples == 6 * 4096
    inputs = seen.inputs["0"]
    assert (inputs.low, inputs.high) == (min(float(b.min()) for b in batches), max(float(b.max()) for b in batches))
    assert len(seen.calls) == 6
    assert torch.equal(seen.calls[0].args[0], batches[0])
    assert not model[0]._forward_pre_hooks
