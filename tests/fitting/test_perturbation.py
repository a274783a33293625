"""Damage where nothing can be differentiated: weights are disturbed one at a time."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import CalibrationError
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.perturbation import perturb
from pared.model.calls import Call
from pared.model.tensors import find_tensors


class Frozen(nn.Module):
    """Switches gradients off in its own forward, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Linear(32, 32)
        self.quiet = nn.Linear(32, 32)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.loud(x) + 0.1 * self.quiet(x)


class Tokens(Frozen):
    """Returns the index of the largest output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def calls(samples: int = 64) -> list[Call]:
    x = torch.randn(samples, 32, generator=torch.Generator().manual_seed(1))
    return [Call((x,), {})]


def test_a_model_without_gradients_is_not_measured_by_them() -> None:
    model = Frozen()
    seen = observe.collect(model, [calls()[0].args[0]], 100)
    assert sensitivity.measure(find_tensors(model), seen.calls, seen.energies, 0) is None


class Overwritten(nn.Linear):
    """Writes into a tensor that its gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x).exp()
        out += 1
        return out.sigmoid()


class InNumpy(nn.Linear):
    """Leaves torch, which a tensor with a gradient may not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(super().forward(x).numpy()))


@pytest.mark.parametrize("make", [Overwritten, InNumpy])
def test_a_model_whose_gradient_fails_is_disturbed(make: type[nn.Linear], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = make(32, 32)
    quantized = pared.fit(model, calib_dataloader=[torch.randn(64, 32)])
    assert "its weights are disturbed one at a time" in caplog.text
    assert pared.report(quantized).count("grid int8") >= 1


def test_predicted_damage_is_what_noise_does() -> None:
    torch.manual_seed(0)
    model = Frozen()
    before = copy.deepcopy(model.state_dict())
    found = perturb(find_tensors(model), calls(), 0).tensors
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(found) == {"loud.weight", "quiet.weight"}
    (call,) = calls(256)
    expected = model(*call.args)
    for name, share in found.items():
        noisy = copy.deepcopy(model)
        weight = noisy.get_parameter(name)
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        measured = float((noisy(*call.args) - expected).square().sum() / expected.square().sum())
        assert float(share.rows.sum()) * 1e-4 == pytest.approx(measured, rel=0.3)
    assert float(found["loud.weight"].rows.sum()) > 1000 * float(found["quiet.weight"].rows.sum())


def test_tokens_are_compared_by_how_many_change() -> None:
    torch.manual_seed(0)
    found = perturb(find_tensors(Tokens()), calls(512), 0).tensors
    assert float(found["loud.weight"].rows.sum()) > float(found["quiet.weight"].rows.sum())


def test_the_same_seed_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = Frozen()
    one, other = (perturb(find_tensors(model), calls(), 3).tensors["loud.weight"].rows for _ in range(2))
    assert torch.equal(one, other)


def test_a_model_that_draws_at_random_is_refused() -> None:
    class Random(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    with pytest.raises(CalibrationError, match="gives different outputs for the same input"):
        perturb(find_tensors(Random()), calls(), 0)


def test_fit_spends_its_bytes_where_errors_cost() -> None:
    torch.manual_seed(0)
    small = pared.fit(Frozen(), pared.PostTrainingQuantConfig(max_size=5500), [calls()[0].args[0]])
    rates = {line.name: line.bits for line in small.plan}
    assert rates["loud.weight"] > rates["quiet.weight"] + 3


class Offset(Frozen):
    """Logits, to which a constant may be added without changing what they say."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x) + self.offset}


def test_damage_is_the_same_notion_as_with_gradients() -> None:
    def found(offset: float, logits: tuple[str, ...]) -> float:
        torch.manual_seed(0)
        return float(perturb(find_tensors(Offset(offset)), calls(), 0, logits).tensors["loud.weight"].rows.sum())

    as_numbers, as_both = found(0.0, ()), found(0.0, ("logits",))
    assert found(1e4, ()) < 1e-6 * as_numbers, "an offset has much energy"
    assert as_both - as_numbers == pytest.approx(found(1e4, ("logits",)), rel=0.02), "and changes no probability"


def test_masked_outputs_do_not_count() -> None:
    class Masked(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(32) == 2, -torch.inf)

    torch.manual_seed(0)
    found = perturb(find_tensors(Masked()), calls(), 0).tensors
    assert all(0 < float(one.rows.sum()) < float("inf") for one in found.values())
