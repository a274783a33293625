"""Mixtures of experts of transformers: what is found, how tokens are counted, and what becomes of rare experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig, Rule
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.experts.balancing import balanced
from pared.fitting.experts.counting import routed
from pared.fitting.experts.finding import Mixture, mixtures
from pared.formats.views import View
from pared.model.calls import Call
from pared.model.tensors import find_tensors
from tests.fitting.experts.models import CONFIGS, EXPERTS, NEVER, Listed, mixture, output, scores, texts
from tests.ratios import snr

WEIGHTS = PostTrainingQuantConfig(approach="weight_only")


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_counted_as_the_router_sends_them(family: str) -> None:
    model = mixture(family)
    tensors = find_tensors(model)
    (found,) = mixtures(tensors)
    assert found.name == "model.layers.0.mlp.experts"
    assert {name.rpartition(".")[2] for kind in found.tensors for name in kind} == {"gate_up_proj", "down_proj"}
    name = "router" if family == "gpt-oss" else "gate"
    assert set(found.routers) == {
        f"model.layers.0.mlp.{name}.{part}"
        for part, _ in model.model.layers[0].mlp.get_submodule(name).named_parameters()
    }
    batches = texts(model, reached=False)
    counts = routed(tensors, (found,), [Call((), batch) for batch in batches])[found.name]
    dense = torch.zeros(EXPERTS, dtype=torch.float64)
    for batch in batches:
        dense += torch.bincount(scores(model, batch["input_ids"]).topk(2, -1).indices.flatten(), minlength=EXPERTS)
    assert torch.equal(counts, dense)
    assert counts[NEVER] == 0


def test_experts_that_are_modules_are_counted_by_their_inputs() -> None:
    model = Listed()
    tensors = find_tensors(model)
    (found,) = mixtures(tensors)
    assert found.routers == ("gate.weight",)
    assert found.tensors[0] == tuple(f"experts.{e}.0.weight" for e in range(EXPERTS))
    ids = torch.arange(60)[None]
    counts = routed(tensors, (found,), [Call((ids,), {})])["experts"]
    chosen = model.gate(model.table(ids[0])).topk(2, -1).indices
    assert torch.equal(counts, torch.bincount(chosen.flatten(), minlength=EXPERTS).double())


def test_layers_in_a_row_are_no_mixture() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.expert_table = nn.Embedding(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)])

    assert mixtures(find_tensors(Deep())) == ()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_an_expert_that_calibration_never_reaches_keeps_its_accuracy(family: str) -> None:
    """On text that needs it the model is nearly as good as on text of the kind that calibration saw."""
    model = mixture(family)
    seen, other = (texts(model, reached=reached) for reached in (False, True))
    small = pared.fit(model, replace(WEIGHTS, max_size="45kB"), seen, quiet=True)
    state = small.state_dict()
    prefix = "model.layers.0.mlp"
    for name in ("gate_up_proj", "down_proj"):
        steps = state[f"{prefix}.experts.{name}_step"].log().mean(1)
        assert steps[NEVER] <= steps[[e for e in range(EXPERTS) if e != NEVER]].median() + 0.05
        before, after = (one.get_parameter(f"{prefix}.experts.{name}").detach() for one in (model, small))
        error = (before - after).square()
        assert float(error[NEVER].mean()) <= 1.5 * float(error.mean((1, 2)).median())
    known, unknown = (
        snr(torch.cat([output(model, b) for b in some]), torch.cat([output(small, b) for b in some]))
        for some in (seen, other)
    )
    assert unknown > known - 3
    assert f"calibration gave 1 of its {EXPERTS} experts fewer than 32 tokens" in " ".join(str(small.report()).split())


@pytest.mark.slow
def test_a_router_is_exact_unless_a_rule_says_otherwise() -> None:
    model = mixture("Mixtral")
    name = "model.layers.0.mlp.gate.weight"
    batches = texts(model, reached=False)[:2]
    small = pared.fit(model, PostTrainingQuantConfig(quant_level=0), batches, quiet=True)
    assert torch.equal(small.get_parameter(name), model.get_parameter(name))
    assert "it chooses among experts: kept exactly" in " ".join(str(small.report()).split())
    conf = PostTrainingQuantConfig(quant_level=0, rules=[Rule("*.gate.weight", bits=4)])
    assert not torch.equal(pared.fit(model, conf, batches, quiet=True).get_parameter(name), model.get_parameter(name))


@pytest.mark.slow
def test_experts_that_are_modules_lean_on_each_other() -> None:
    model = Listed().eval()
    never = 2
    words = [w for w in range(300) if never not in model.gate(model.table(torch.tensor(w))).topk(2).indices.tolist()]
    ids = torch.tensor(words)[torch.randint(len(words), (6, 50), generator=torch.Generator().manual_seed(0))]
    small = pared.fit(model, WEIGHTS, list(ids.split(1)), quiet=True)
    inputs = torch.randn(200, 32)
    with torch.no_grad():
        worst = [snr(one(inputs), other(inputs)) for one, other in zip(model.experts, small.experts, strict=True)]
    assert worst[never] > sorted(worst)[len(worst) // 2] - 3
    assert "calibration gave this expert 0 tokens, fewer than 32" in " ".join(str(small.report()).split())


def stack(experts: int, rows: int, columns: int) -> tuple[Any, Mixture, Sensitivity, Tensor]:
    """A stack, and sums over tokens as calibration makes them; the last expert got no token."""
    generator = torch.Generator().manual_seed(0)
    holder = nn.Module()
    holder.experts = nn.Module()
    holder.experts.w = nn.Parameter(torch.randn(experts, rows, columns, generator=generator))
    tensors = find_tensors(holder)
    own = replace(tensors.tensors[0], view=View((experts, rows, columns), (0, 1)), groups=experts)
    counts = torch.arange(experts - 1, -1, -1).double() ** 2
    gradients = [torch.randn(int(n), rows, columns, generator=generator) for n in counts]
    moments = torch.stack([torch.einsum("nrc,nrd->cd", g, g) for g in gradients])
    half = torch.stack([torch.einsum("nrc,nrd->cd", g[::2], g[::2]) for g in gradients])
    importance = torch.cat([g.double().square().sum((0, 2)) for g in gradients])
    stats = TensorStats(importance, moments, half, Blocks(experts))
    found = Mixture("experts", experts, (("experts.w",),), ())
    return replace(tensors, tensors=(own,)), found, Sensitivity({"experts.w": stats}), counts


def test_moments_of_an_expert_are_means_of_its_own_and_of_the_layers() -> None:
    tensors, found, before, counts = stack(4, 6, 5)
    after = balanced(before, tensors, [found], {"experts": counts}, prior=2.0).tensors["experts.w"]
    own, k = before.tensors["experts.w"], 2.0 * 5
    assert own.moments is not None
    assert after.moments is not None
    shared = own.moments.sum(0) / counts.sum()
    for e in range(4):
        each = own.moments[e] / counts[e].clamp(min=1)
        expected = (counts[e] * each + k * shared) / (counts[e] + k)
        assert torch.allclose(after.moments[e] / (counts[e] + k), expected.float(), rtol=1e-5)
    assert after.unseen is not None
    seen = after.moments - after.unseen
    assert float(torch.linalg.eigvalsh(seen).min()) > -1e-4  # what is judged is none of what was made


def test_no_expert_counts_less_than_the_median_one() -> None:
    tensors, found, before, counts = stack(5, 6, 5)
    after = balanced(before, tensors, [found], {"experts": counts}).tensors["experts.w"]
    own, raised = (stats.rows.reshape(5, 6) for stats in (before.tensors["experts.w"], after))
    levels = raised.log().mean(1)
    median = own[:4].log().mean(1).median()
    assert bool((levels >= median - 1e-9).all())
    assert torch.equal(raised[:2], own[:2])  # those above the median are as they were
    assert float(levels[4]) == pytest.approx(float(median))


@pytest.mark.parametrize("counts", [{}, {"experts": torch.zeros(4)}])
def test_what_is_not_counted_stays(counts: dict[str, Tensor]) -> None:
    tensors, found, before, _ = stack(4, 6, 5)
    assert balanced(before, tensors, [found], counts).tensors == before.tensors
