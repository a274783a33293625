"""Forwards that change what they are given, or themselves: each call is measured as it was made."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import CalibrationError, PostTrainingQuantConfig
from tests.ratios import snr

EIGHT = PostTrainingQuantConfig(quant_level=0)


class Scaled(nn.Module):
    """Brings its input to a common scale, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace, self.a, self.b = inplace, nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            x -= 100.0
            x /= 30.0
        else:
            x = (x - 100.0) / 30.0
        out: Tensor = self.b(F.gelu(self.a(x)))
        return out


@pytest.mark.parametrize("approach", ["auto", "static", "weight_only"])
def test_a_forward_that_works_in_place_gives_the_same_model(approach: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(64, 64) * 30 + 100
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model, batches = Scaled(inplace), [data[:32].clone(), data[32:].clone()]
        q = pared.fit(model, PostTrainingQuantConfig(approach=approach), batches)
        assert torch.equal(torch.cat(batches), data), "the caller's batches stay as they are"
        assert snr(model(data.clone()).detach(), q(data.clone())) > 28
        found.append(q.state_dict())  # which kernels run is measured, and may differ
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


class Writes(nn.Module):
    """As many graph networks: results are written into the batch."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, hidden), nn.Linear(hidden, 8)

    def forward(self, batch: Any) -> Tensor:
        batch["x"] = self.a(batch["x"]).relu()
        out: Tensor = self.b(batch["x"])
        return out


@dataclass
class Molecule:
    positions: Tensor
    found: list[Tensor]


class Molecular(Writes):
    def forward(self, batch: Any) -> Tensor:
        batch.positions = self.a(batch.positions).relu()
        batch.found.append(self.b(batch.positions))
        return batch.found[-1]


class Pops(Writes):
    def forward(self, states: Any, options: Any) -> Tensor:  # type: ignore[override]  # on purpose
        scale = options.pop("scale")
        states.append(self.a(states.pop(0)).relu() * scale)
        out: Tensor = self.b(states[-1])
        return out


@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("kind", [Writes, Molecular, Pops])
def test_what_a_forward_writes_into_its_arguments(kind: type[Writes], hidden: int) -> None:
    torch.manual_seed(0)
    model, x = kind(hidden), torch.randn(50, 32)

    def batch() -> Any:
        if kind is Writes:
            return ({"x": x.clone()},)
        return (Molecule(x.clone(), []),) if kind is Molecular else {"states": [x.clone()], "options": {"scale": 2.0}}

    given = batch()
    q = pared.fit(model, None, [given])

    def output(one: nn.Module) -> Tensor:
        made = batch()
        out: Tensor = one(**made) if isinstance(made, dict) else one(*made)
        return out.detach()

    assert 28 < snr(output(model), output(q)) < 60
    assert torch.equal(output(q), output(q))
    assert not isinstance(given, dict) or (len(given["states"]) == 1 and given["options"] == {"scale": 2.0})


class Streaming(nn.Module):
    """Goes on where the last call stopped: in an attribute, a list, a counter and a buffer."""

    steps: Tensor
    hidden: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(16, 32), nn.Linear(32, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.hidden = None
        self.past: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, self.hidden)
        self.past.append(self.hidden)
        self.steps += 1
        out: Tensor = self.out(self.hidden + sum(self.past[:-1]) / int(self.steps))
        return out


class InNumpy(Streaming):
    def forward(self, x: Tensor) -> Tensor:
        return in_numpy(super().forward(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_state_in_the_model_is_as_it_was_at_each_call(gradients: bool) -> None:
    torch.manual_seed(0)
    model = Streaming()
    if not gradients:  # measured by disturbing weights, which compares outputs of the same call
        model.__class__ = InNumpy
    chunks = [torch.randn(4, 16) for _ in range(5)]
    q = pared.fit(model, EIGHT, chunks)
    for one in (model, q):
        assert one.hidden is None
        assert one.past == []
        assert int(one.steps) == 0
    with torch.no_grad():
        for chunk in chunks:
            assert snr(model(chunk), q(chunk)) > 25  # errors of the state add up


def in_numpy(y: Tensor) -> Tensor:
    """What no gradient leads through, so that weights are disturbed one at a time."""
    return torch.from_numpy(y.detach().numpy() * 1)


@pytest.mark.parametrize("where", ["torch", "numpy", "dropout"])
def test_what_is_random_is_told(where: str) -> None:
    class Random(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = in_numpy(super().forward(x))
            if where == "dropout":
                return F.dropout(y, 0.5)
            return y + (torch.rand(()) if where == "torch" else float(np.random.rand()))

    with pytest.raises(CalibrationError, match="as it draws random numbers") as error:
        pared.fit(Random(4, 4), None, [torch.ones(2, 4)])
    assert "Switch off what is random" in str(error.value)


def test_what_cannot_be_put_back_is_not_called_random() -> None:
    count = [0]

    class Outside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            count[0] += 1
            return in_numpy(super().forward(x)) + count[0]

    with pytest.raises(CalibrationError, match="draws no random numbers: it keeps something between calls"):
        pared.fit(Outside(4, 4), None, [torch.ones(2, 4)])


def test_a_call_that_cannot_be_made_again_is_told() -> None:
    class Once(nn.Linear):
        def forward(self, rows: Any) -> Tensor:
            return in_numpy(super().forward(next(rows)))

    rows = (row for row in [torch.ones(2, 4)])
    with pytest.raises(CalibrationError, match="raised StopIteration when a call of the calibration data was made"):
        pared.fit(Once(4, 4), None, lambda model: model(rows))


@pytest.mark.slow
def test_calibration_through_generate_with_its_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )
    ids = torch.randint(1, 100, (2, 8))

    def generate(one: nn.Module, cached: bool = True) -> Tensor:
        tokens: Tensor = one.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=cached
        )
        return tokens

    q = pared.fit(model, None, generate)
    with torch.no_grad():
        logits, ours = model(ids).logits, q(ids).logits
    lost = F.kl_div(ours.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
    assert 0 < float(lost) / ids.shape[1] < 0.005
    assert torch.equal(generate(q), generate(q, cached=False))


def test_what_changing_calls_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from pared.fitting.calibration import observe

    class Grows(nn.Linear):
        def forward(self, cache: Any) -> Tensor:
            cache.append(torch.ones(1, 4))
            return super().forward(torch.cat(cache))

    def calibrate(model: nn.Module) -> None:
        cache = [torch.ones(1, 4)]
        for _ in range(64):
            model(cache)

    monkeypatch.setattr(observe, "_MOST_BYTES", 16 * 200)
    seen = observe.collect(Grows(4, 4), calibrate, 1000)
    lengths = [len(call.args[0]) for call in seen.calls]
    assert lengths[0] == 1
    assert sum(lengths) <= 200
    assert len(lengths) >= 4
    assert max(lengths) > 32
    assert len(set(np.diff(lengths))) == 1, "evenly spaced"
    assert math.isfinite(sum(seen.energies.values()))
