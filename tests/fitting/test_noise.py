"""Nothing is written but by our logger; our hooks step aside where a forward transforms functions."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from tests.ratios import snr

EIGHT = PostTrainingQuantConfig(quant_level=0)


class Mixture(nn.Module):
    """Which expert runs depends on values."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(64, experts)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(x[chosen == i])
        return out


class Rows(nn.Linear):
    """Takes a number out of its input, and a size from its values."""

    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().sum()) % 3 + 1
        if x[0, 0].item() > 1e9:
            return x
        return super().forward(x[:count]).repeat(x.nonzero().shape[0], 1)[: len(x)]


class Warns(nn.Linear):
    """What it does with gradients makes torch warn."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.tensor(float(y.detach().sum()) != 0) + (float(y.sum()) * 0)


@pytest.mark.slow
@pytest.mark.whole_models_are_timed
@pytest.mark.parametrize("make", [lambda: Mixture(6), lambda: Rows(64, 64), lambda: Warns(64, 64)])
def test_nothing_is_written(
    make: type[nn.Module], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(64, 64)
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]
    levels = {name: logging.getLogger(name).level for name in names}
    with torch.no_grad():
        model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q = pared.fit(model, None, [x], quiet=True)
    assert capfd.readouterr() == ("", "")
    assert [str(one.message) for one in caught if "requires_grad" in str(one.message)] == []
    assert {record.name.split(".")[0] for record in caplog.records} <= {"pared"}
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("\n" not in message and len(message) < 500 for message in shown)
    assert {name: logging.getLogger(name).level for name in names} == levels
    with torch.no_grad():
        assert q(x).shape == model(x).shape


def test_what_the_model_prints_is_the_users(capfd: pytest.CaptureFixture[str]) -> None:
    class Prints(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            print("mine")  # noqa: T201  # on purpose
            return super().forward(x)

    pared.fit(Prints(4, 4), EIGHT, [torch.ones(2, 4)], quiet=True)
    captured = capfd.readouterr()
    assert set(captured.out.split()) == {"mine"}
    assert captured.err == ""


class Transformed(nn.Module):
    """Calls its network inside a function of `torch.func`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "vmap":
            y = torch.func.vmap(self.net)(x)
        elif self.how == "functional_call":
            y = torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,))
        elif self.how == "jacrev":
            y = torch.func.vmap(torch.func.jacrev(self.net))(x).sum(-1)
        elif self.how == "jvp":
            y = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]
        else:
            parameters = dict(self.net.named_parameters())

            def loss(given: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(self.net, given, (x,)).square().mean()

            y = self.net(x) + torch.func.grad(loss)(parameters)["2.bias"]
        out: Tensor = self.head(y)
        return out


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of the first `jvp` in a process
@pytest.mark.parametrize("how", ["vmap", "functional_call", "jacrev", "jvp", "grad"])
@pytest.mark.parametrize("approach", ["auto", "static"])
def test_functions_that_are_transformed_in_a_forward(how: str, approach: str) -> None:
    torch.manual_seed(0)
    model, x = Transformed(how), torch.randn(16, 8)
    q = pared.fit(model, PostTrainingQuantConfig(approach=approach, quant_level=0), [x])
    assert snr(model(x).detach(), q(x).detach()) > 25


def test_a_model_that_is_transformed_as_a_whole_is_called_once_plainly() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8)
    with pytest.raises(pared.CalibrationError, match="only inside functions that are being transformed"):
        pared.fit(model, EIGHT, lambda m: torch.func.vmap(m)(x))
    q = pared.fit(model, EIGHT, lambda m: (torch.func.vmap(m)(x), m(x)))
    assert snr(model(x).detach(), q(x).detach()) > 28


def test_a_layer_that_cannot_be_observed_stays_in_float() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(F.relu(self.layer(x.to_sparse())))
            return out

    torch.manual_seed(0)
    model, x = Sparse(), torch.randn(16, 8)
    q = pared.fit(model, EIGHT, [x])
    assert snr(model(x).detach(), q(x).detach()) > 25
