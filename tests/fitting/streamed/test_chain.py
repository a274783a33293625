"""What a model gives its blocks has to be the same whatever its weights are, and whenever a block is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.fitting.calibration.gathering import pieces
from pared.fitting.streamed.parts.blocks import NotInBlocks, find_blocks
from pared.fitting.streamed.parts.chain import Chain
from pared.model.calls import Call
from pared.model.tensors import find_tensors
from tests.fitting.streamed.models import small, some_calls, sweeps_of, written

Given = Callable[["Model", Tensor, Any], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, more: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        del more
        return hidden + self.inner(hidden), self.inner(hidden), hidden.sign().long()


class Other(Block):
    """Another class of block, which takes a stream, too."""


class Model(nn.Module):
    """Gives its blocks what a function makes of the first one's input and of what the last one returned."""

    def __init__(self, given: Given, *, within: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Block(), Other(), Block()])
        self.bias = nn.Parameter(torch.ones(3))
        self.given, self.within = given, within

    def forward(self, ids: Tensor) -> Tensor:
        entered = hidden = self.table(ids)
        last = None
        for layer in self.layers:
            hidden, *last = layer(hidden, more=self.given(self, entered, last))
            if self.within:
                hidden.mul_(2)
        return hidden


def started(model: Model, length: int = 5) -> tuple[Tensor, Any]:
    chain = Chain(model, find_blocks(find_tensors(model)))
    chain.learn(Call((torch.arange(3),), {}))
    return chain.start(Call((torch.arange(length),), {}))


@pytest.mark.parametrize(
    "given",
    [
        lambda model, entered, last: torch.ones(3),
        lambda model, entered, last: (len(entered), {"kind": "causal", "type": entered.dtype}),
        lambda model, entered, last: torch.arange(len(entered)) < entered.shape[1],
    ],
)
def test_constants_are_recorded(given: Given) -> None:
    model = Model(given)
    entered, arguments = started(model)
    assert torch.equal(entered, model.table.weight[:5])
    assert not entered.requires_grad
    assert len(arguments.of_blocks) == 3
    blocks = Chain(model, find_blocks(find_tensors(model)))
    blocks.learn(Call((torch.arange(5),), {}))
    torch.testing.assert_close(blocks.block(1, entered, arguments), model.layers[1](entered)[0])


@pytest.mark.parametrize(
    "given",
    [
        lambda model, entered, last: model.bias + 1,
        lambda model, entered, last: [entered.detach() + 1],
        lambda model, entered, last: {"first": entered},
        lambda model, entered, last: entered.mean(),
        lambda model, entered, last: last and last[0],
        lambda model, entered, last: last and last[0].mean() * 2,
        lambda model, entered, last: last and last[1],
    ],
)
def test_what_depends_on_weights_is_refused(given: Given) -> None:
    with pytest.raises(NotInBlocks, match="gets more, which depends on weights or on what another block returns"):
        started(Model(given))


def test_what_a_block_may_change_is_refused() -> None:
    """A cache would be fuller each time a block is run."""

    class Cache:
        pass

    cache = Cache()
    with pytest.raises(NotInBlocks, match="block 0 gets more, a Cache, which it may change"):
        started(Model(lambda model, entered, last: (1, cache)))


def test_what_happens_between_blocks_is_refused() -> None:
    with pytest.raises(NotInBlocks, match="changes the hidden states between its blocks"):
        started(Model(lambda model, entered, last: None, within=True))


def test_equal_arguments_are_held_once() -> None:
    model = Model(lambda model, entered, last: torch.ones(3))
    chain = Chain(model, find_blocks(find_tensors(model)))
    chain.learn(Call((torch.arange(3),), {}))
    found = [chain.start(Call((torch.arange(length),), {}))[1] for length in (3, 5)]
    held = {id(kwargs["more"]) for one in found for _, kwargs in one.of_blocks}
    assert len(held) == 1


def test_tables_on_the_disk_are_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked up for each block besides the stream, of a table that is never loaded."""
    monkeypatch.setattr(pieces, "LARGE", 1)
    folder = written(small("Llama", layers=2), tmp_path / "model")
    with sweeps_of(folder, tmp_path / "work", some_calls(1)) as sweeps:
        model: Any = sweeps.weights.tensors.model
        own = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda hidden, **more: tuple(x + hidden.mean() for x in own(hidden, **more))
        with pytest.raises(NotInBlocks, match="gets position_embeddings, which depends on weights"):
            sweeps.start()
