"""Which outputs count as logits: what is known, not what has the name; and nothing counts less for it."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import pared
from pared import ConfigError, PostTrainingQuantConfig
from pared.fitting.calibration.logits import find_logits
from pared.model.calls import Call

pytestmark = [pytest.mark.model, pytest.mark.slow]

SMALL: dict[str, Any] = {
    **{"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.1},
}


def ids(batch: int = 32) -> Tensor:
    return torch.randint(1, 60, (batch, 12), generator=torch.Generator().manual_seed(batch))


def decibels(model: nn.Module, q: nn.Module, x: Tensor) -> dict[str, float]:
    with torch.no_grad():
        pairs = {key: (value, q(x)[key]) for key, value in model(x).items()}
    return {k: float(10 * torch.log10(a.square().sum() / (a - b).square().sum())) for k, (a, b) in pairs.items()}


class Heads(nn.Module):
    """Two heads, one of which has a name that says nothing."""

    def __init__(self, name: str, unit: float = 1.0) -> None:
        super().__init__()
        self.name, self.unit = name, unit
        self.a, self.c, self.m = nn.Linear(64, 96), nn.Linear(96, 10), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).relu()
        return {self.name: self.unit * self.c(h), "masks": self.m(h)}


@pytest.mark.parametrize("unit", [1.0, 0.01])
@pytest.mark.parametrize("name", ["logits", "hidden_states", "past_key_values"])
def test_every_output_counts_whatever_its_name(name: str, unit: float) -> None:
    torch.manual_seed(0)
    model, x = Heads(name, unit).eval(), torch.randn(128, 64)
    weights = PostTrainingQuantConfig(approach="weight_only")  # whether activations are quantized, timings decide
    q = pared.fit(model, weights, [x], quiet=True)
    plain = pared.fit(_renamed(model), weights, [x], quiet=True)
    found, expected = decibels(model, q, x), decibels(_renamed(model), plain, x)
    assert found["masks"] == pytest.approx(expected["masks"], abs=0.1)
    assert found[name] == pytest.approx(expected["classes"], abs=0.1)
    assert min(found.values()) > 26


def _renamed(model: Heads) -> Heads:
    other = Heads("classes", model.unit).eval()
    other.load_state_dict(model.state_dict())
    return other


def _classifier(**options: Any) -> Any:
    return BertForSequenceClassification(cast("Any", BertConfig)(**SMALL, **options))


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_a_regression_keeps_its_energy_in_any_unit(unit: float) -> None:
    torch.manual_seed(0)
    model = _classifier(num_labels=3, problem_type="regression").eval()
    model.classifier.weight.data.mul_(unit / model(ids()).logits.std().item())
    q = pared.fit(model, None, [ids()], quiet=True)
    assert decibels(model, q, ids())["logits"] > 29


class Scored(nn.Module):
    """Uses its outputs in ways from which it follows what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        attention = (x[:, None] * x[..., None]).softmax(-1).sum(-1)
        first, second, third = self.a(x), self.b(x), self.b(attention)
        loss = F.cross_entropy(first.view(-1, 5), torch.zeros(len(x), dtype=torch.long))
        assert loss.isfinite()
        return first, (second, third.softmax(0)), third.softmax(-1)


def test_a_softmax_that_is_seen_tells() -> None:
    call = Call((torch.randn(4, 8),), {})
    assert find_logits(Scored(), call, "auto", ()) == {"0"}, "neither probabilities nor a softmax over the samples"


def test_a_configuration_and_a_class_tell() -> None:
    call = Call((ids(),), {})

    def found(kind: type[nn.Module], **options: Any) -> frozenset[str]:
        return find_logits(cast("Any", kind)(cast("Any", BertConfig)(**SMALL, **options)), call, "auto", ())

    assert found(BertForMaskedLM) == {"logits"}
    assert found(BertForSequenceClassification, num_labels=3) == frozenset()
    assert found(BertForSequenceClassification, num_labels=60, problem_type="regression") == frozenset()
    assert found(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification") == frozenset()
    assert found(BertForSequenceClassification, num_labels=3, problem_type="single_label_classification") == {"logits"}


def test_a_class_tells_where_no_call_can_be_watched() -> None:
    class Unwatched(BertForMaskedLM):  # type: ignore[no-untyped-call]  # as transformers has it
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if torch._C._len_torch_function_stack():
                raise RuntimeError("runs below no mode")
            return super().forward(*args, **kwargs)

    model = cast("Any", Unwatched)(cast("Any", BertConfig)(**SMALL)).eval()
    assert find_logits(model, Call((ids(),), {}), "auto", ()) == {"logits"}


def test_the_user_may_say_so() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), torch.randn(64, 32)
    model[2].weight.data.mul_(30)  # so decided that an error of little energy changes a class
    told = pared.fit(model, PostTrainingQuantConfig(logits=("output",)), [x], quiet=True)
    plain = pared.fit(model, None, [x], quiet=True)
    with torch.no_grad():
        p, *found = (one(x).log_softmax(-1) for one in (model, told, plain))
    lost = [2 * F.kl_div(q, p, log_target=True, reduction="batchmean").item() for q in found]
    assert lost[0] < 2e-3 < lost[1]
    with pytest.raises(ConfigError, match=r"no floating output 'logits'\n.*outputs are: 'output'"):
        pared.fit(model, PostTrainingQuantConfig(logits=("logits",)), [x], quiet=True)
    with pytest.raises(ConfigError, match="neither 'auto' nor a list"):
        PostTrainingQuantConfig(logits=3)
